# SPDX-License-Identifier: Apache-2.0
"""Public functions of 8-bit keys and values: contract, checks and choice of implementation.

A head's key or value has a scale of its own, by which its largest entry becomes the largest e4m3
number. Other than the indexer's vectors it is not rotated, and the scale is no power of two: where
one channel outweighs the others, as happens in keys, that entry is then exact.

Shape letter: C channels of a head; further dimensions before it are free.
"""

from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import check_dtypes
from megatron_keye.kernels.head_quantization import reference
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.registration import composite, opaque

IMPLEMENTATIONS = ("eager", "triton")
"""What exists; "triton" is the default on a GPU in the types that it takes, "eager" elsewhere.
Both give the same bits."""
HEAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
"""Types whose range holds a scale times an e4m3 number; float16 has too few exponents."""


@composite("quantize_heads")
def quantize_heads(heads: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Round keys or values to e4m3, each head of a token with a scale of its own.

    An entry of at least 2^-14 of its head's largest is off by 2^-4 of itself at most. Not
    differentiable.

    Args:
        heads: [..., C], bfloat16, float32 or float64, finite.
        impl: One of IMPLEMENTATIONS, or None for the default; "triton" takes no float64.

    Returns:
        Values [..., C], float8_e4m3fn, rounded to nearest even, and scales [...], float32: the
        head's largest magnitude, or 1e-30 where that is smaller, divided by 448. A head is 4 bytes
        longer than its channels.

    Raises:
        ValueError: On a type that is not taken, a head without channels, or an unknown `impl`.
    """
    chosen = choose_impl("quantize_heads", impl, IMPLEMENTATIONS, triton=suits_triton(heads))
    check_dtypes(HEAD_DTYPES, heads=heads)
    if heads.ndim == 0 or heads.shape[-1] == 0:
        raise ValueError(
            f"heads: got shape {tuple(heads.shape)}, expected [..., C] with 1 channel or more"
        )
    return _quantize(heads.detach(), chosen)


def _fake_quantize(heads: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    values = heads.new_empty(heads.shape, dtype=torch.float8_e4m3fn)
    return values, heads.new_empty(heads.shape[:-1], dtype=torch.float32)


@opaque("quantize_heads_as", _fake_quantize)
def _quantize(heads: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Return values and scales of an implementation."""
    if impl == "triton":
        # Loaded on demand: everything else must import where Triton cannot compile.
        triton = import_module("megatron_keye.kernels.head_quantization.triton")
        result: tuple[Tensor, Tensor] = triton.quantize_heads(heads)
        return result
    return reference.quantize_heads(heads)


@composite("dequantize_heads")
def dequantize_heads(
    values: Tensor, scales: Tensor, dtype: torch.dtype, *, impl: str | None = None
) -> Tensor:
    """Return values * scales, multiplied in float32 or better and rounded once to `dtype`.

    Args:
        values: [..., C], float8_e4m3fn.
        scales: [...], float32.
        dtype: One of HEAD_DTYPES.
        impl: One of IMPLEMENTATIONS, or None for the default; "triton" takes no float64.

    Raises:
        ValueError: On another type or shape, or an unknown `impl`.
    """
    takes_triton = values.is_cuda and dtype != torch.float64
    chosen = choose_impl("dequantize_heads", impl, IMPLEMENTATIONS, triton=takes_triton)
    check_dtypes((torch.float8_e4m3fn,), values=values)
    check_dtypes((torch.float32,), scales=scales)
    if values.shape[:-1] != scales.shape:
        raise ValueError(
            f"scales: got shape {tuple(scales.shape)}, expected {tuple(values.shape[:-1])}, "
            "one for each head of a token"
        )
    if dtype not in HEAD_DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected float64, float32 or bfloat16")
    return _dequantize(values.detach(), scales.detach(), dtype, chosen)


def _fake_dequantize(values: Tensor, _: Tensor, dtype: torch.dtype, *__: object) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


@opaque("dequantize_heads_as", _fake_dequantize)
def _dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """Return the heads by an implementation."""
    if impl == "triton":
        triton = import_module("megatron_keye.kernels.head_quantization.triton")
        result: Tensor = triton.dequantize_heads(values, scales, dtype)
        return result
    return reference.dequantize_heads(values, scales, dtype)
