# SPDX-License-Identifier: Apache-2.0
"""Eager form of the sparse attention to 8-bit keys: widen them, then the attention itself.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from torch import Tensor

from megatron_keye.kernels.head_quantization.reference import dequantize_heads
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.sparse_attention.reference import sparse_attention


def sparse_attention_fp8(
    q_THC: Tensor,
    k_SGC: Tensor,
    k_scales_SG: Tensor,
    v_SGC: Tensor,
    v_scales_SG: Tensor,
    indices_TK: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return out_THC; see api.sparse_attention_fp8."""
    dtype = accumulation_dtype(q_THC)
    wide_k_SGC = dequantize_heads(k_SGC, k_scales_SG, dtype)
    wide_v_SGC = dequantize_heads(v_SGC, v_scales_SG, dtype)
    out_THC, _ = sparse_attention(q_THC, wide_k_SGC, wide_v_SGC, indices_TK, scale=scale)
    return out_THC
