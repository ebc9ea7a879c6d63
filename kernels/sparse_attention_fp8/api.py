# SPDX-License-Identifier: Apache-2.0
"""Public function of the sparse attention to 8-bit keys: contract, checks and choice.

A cache of e4m3 keys and values takes about half the memory of bfloat16. In float64 their rounding
moves outputs by 2 to 4 % of their norm where attention is spread over most of 1,024 keys, and by 5
to 7 % where few decide; bfloat16 moves them by 0.2 to 0.5 % (docs/decisions.md).

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys.
"""

from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import (
    INDEX_DTYPES,
    check_dtypes,
    check_groups,
    check_shapes,
)
from megatron_keye.kernels.head_quantization.api import HEAD_DTYPES
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.registration import composite, opaque
from megatron_keye.kernels.sparse_attention import cuda
from megatron_keye.kernels.sparse_attention_fp8 import reference

IMPLEMENTATIONS = ("eager", "triton", "cuda")
"""What exists: those of `sparse_attention`, with the same default."""


def sparse_attention_fp8(
    q_THC: Tensor,
    k_SGC: Tensor,
    k_scales_SG: Tensor,
    v_SGC: Tensor,
    v_scales_SG: Tensor,
    indices_TK: Tensor,
    *,
    scale: float,
    impl: str | None = None,
) -> Tensor:
    """Attend as `sparse_attention` does to what `dequantize_heads` makes of keys and values.

    For inference: there is no backward pass, and no target.

    Args:
        q_THC: Queries, bfloat16, float32 or float64, without gradients.
        k_SGC: Keys, float8_e4m3fn, as `quantize_heads` returns them.
        k_scales_SG: Their scales, float32.
        v_SGC: Values, likewise.
        v_scales_SG: Their scales.
        indices_TK: See `sparse_attention`.
        scale: Factor of the logits, usually C^-0.5.
        impl: One of IMPLEMENTATIONS, or None for the default. They take what they take of
            `sparse_attention`; "cuda" widens all keys and values to bfloat16 first.

    Returns:
        out_THC, type of `q_THC`.

    Raises:
        ValueError: On shapes, types or devices that do not fit, queries that want a gradient, or
            an unknown `impl`.
        RuntimeError: See `sparse_attention`.
    """
    if torch.is_grad_enabled() and q_THC.requires_grad:
        raise ValueError(
            "q_THC: got queries that want a gradient, expected none, since sparse_attention_fp8 "
            "is for inference; call it under torch.no_grad(), or take sparse_attention"
        )
    cached = k_SGC, k_scales_SG, v_SGC, v_scales_SG
    return _attend(q_THC, *cached, indices_TK, scale, impl)


@composite("sparse_attention_fp8")
def _attend(
    q_THC: Tensor,
    k_SGC: Tensor,
    k_scales_SG: Tensor,
    v_SGC: Tensor,
    v_scales_SG: Tensor,
    indices_TK: Tensor,
    scale: float,
    impl: str | None,
) -> Tensor:
    """Return what sparse_attention_fp8 returns."""
    scales = {"k_scales_SG": k_scales_SG, "v_scales_SG": v_scales_SG}
    values = {"k_SGC": k_SGC, "v_SGC": v_SGC}
    sizes = check_shapes(q_THC=q_THC, **values, **scales, indices_TK=indices_TK)
    check_groups(sizes["H"], sizes["G"])
    check_dtypes(HEAD_DTYPES, q_THC=q_THC)
    check_dtypes((torch.float8_e4m3fn,), **values)
    check_dtypes((torch.float32,), **scales)
    check_dtypes(INDEX_DTYPES, indices_TK=indices_TK)
    takes_triton = suits_triton(q_THC)
    takes_cuda = takes_triton and cuda.suits(q_THC, k_SGC, scale)
    chosen = choose_impl(
        "sparse_attention_fp8", impl, IMPLEMENTATIONS, triton=takes_triton, cuda=takes_cuda
    )
    cached = k_SGC.detach(), k_scales_SG.detach(), v_SGC.detach(), v_scales_SG.detach()
    return _attend_as(q_THC.detach(), *cached, indices_TK, scale, chosen)


def _fake_attend(q_THC: Tensor, *_: object) -> Tensor:
    return q_THC.new_empty(q_THC.shape)


@opaque("sparse_attention_fp8_as", _fake_attend)
def _attend_as(
    q_THC: Tensor,
    k_SGC: Tensor,
    k_scales_SG: Tensor,
    v_SGC: Tensor,
    v_scales_SG: Tensor,
    indices_TK: Tensor,
    scale: float,
    impl: str,
) -> Tensor:
    """Return out_THC of an implementation."""
    operands = q_THC, k_SGC, k_scales_SG, v_SGC, v_scales_SG, indices_TK
    if impl == "eager":
        return reference.sparse_attention_fp8(*operands, scale=scale)
    # Loaded on demand: everything else must import where Triton cannot compile.
    triton = import_module("megatron_keye.kernels.sparse_attention_fp8.triton")
    result: Tensor = triton.sparse_attention_fp8(*operands, scale=scale, impl=impl)
    return result
