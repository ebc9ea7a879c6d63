# SPDX-License-Identifier: Apache-2.0
"""The sparse attention to 8-bit keys on a GPU: they are widened in registers, or once before.

Triton's kernel is that of the sparse attention, with half the bytes to gather. The CUDA kernel of
the sparse attention is bound by its products rather than by bytes, so keys are widened to bfloat16
before it, in a pass over them that takes a few hundredths of its time.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

import torch
from torch import Tensor

from megatron_keye.kernels.head_quantization.triton import dequantize_heads
from megatron_keye.kernels.launch import check_triton
from megatron_keye.kernels.sparse_attention import cuda, triton
from megatron_keye.kernels.sparse_attention.triton import lay_out_heads
from megatron_keye.kernels.union_lists import union_lists


def sparse_attention_fp8(
    q_THC: Tensor,
    k_SGC: Tensor,
    k_scales_SG: Tensor,
    v_SGC: Tensor,
    v_scales_SG: Tensor,
    indices_TK: Tensor,
    *,
    scale: float,
    impl: str,
) -> Tensor:
    """Return out_THC by "triton" or "cuda"; see api.sparse_attention_fp8."""
    if impl == "cuda":
        cuda.check_call(q_THC, k_SGC, scale)
    check_triton("sparse_attention_fp8", q_THC, q_THC=q_THC)
    lists = union_lists(indices_TK, k_SGC.shape[0], impl="triton")
    if impl == "cuda":
        k_SGC, v_SGC = (
            dequantize_heads(values_SGC, scales_SG, torch.bfloat16)
            for values_SGC, scales_SG in ((k_SGC, k_scales_SG), (v_SGC, v_scales_SG))
        )
        return cuda.attend(*lay_out_heads(q_THC, k_SGC, v_SGC), lists, scale=scale)[0]
    scales = k_scales_SG.contiguous(), v_scales_SG.contiguous()
    heads = lay_out_heads(q_THC, k_SGC, v_SGC)
    return triton.attend(*heads, lists, scale=scale, scales=scales)[0]
