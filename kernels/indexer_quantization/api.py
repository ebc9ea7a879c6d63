# SPDX-License-Identifier: Apache-2.0
"""Public functions of the indexer's 8-bit form: contract, checks and choice of implementation.

Inference keeps what `quantize` returns, training computes with what `round_to_fp8` returns; both
are the same numbers, so that the selection learned is the selection served.

Shape letter: J indexer channels; further dimensions before it are free.
"""

from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import check_dtypes
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.indexer_quantization import reference
from megatron_keye.kernels.registration import composite, opaque

IMPLEMENTATIONS = ("eager", "triton")
"""What exists; "triton" is the default on a GPU in the types that it takes, "eager" elsewhere.
Both give the same bits."""
VECTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
"""Types that hold every quantised number exactly; float16 has too few exponents."""


@composite("quantize")
def quantize(vectors: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotate vectors by the Hadamard matrix, then round each to e4m3 with a scale of its own.

    The rotation spreads what is large in one channel over all of them; products of two rotated
    vectors are those of the vectors. Not differentiable; `round_to_fp8` is.

    Args:
        vectors: [..., J], bfloat16, float32 or float64, finite; J a power of two, 2 or more.
        impl: One of IMPLEMENTATIONS, or None for the default.

    Returns:
        Values [..., J], float8_e4m3fn, rounded to nearest even, and scales [...], float32: the
        smallest power of two by which the vector, or 1e-4 where all of it is smaller, fits into
        448, the largest e4m3 number. A vector is 4 bytes longer than its channels.

    Raises:
        ValueError: On a type or a J that is not taken, or an unknown `impl`.

    Source: the released Keye-VL-2.0 serving code: x H / sqrt(J) rounded to the type of x, then
    e4m3 with one ue8m0 scale per vector.
    """
    return _quantize(vectors.detach(), _choose("quantize", vectors, impl))


def _fake_quantize(vectors: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    values = vectors.new_empty(vectors.shape, dtype=torch.float8_e4m3fn)
    return values, vectors.new_empty(vectors.shape[:-1], dtype=torch.float32)


@opaque("quantize_as", _fake_quantize)
def _quantize(vectors: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Return values and scales of an implementation."""
    if impl == "triton":
        # Loaded on demand: everything else must import where Triton cannot compile.
        triton = import_module("megatron_keye.kernels.indexer_quantization.triton")
        result: tuple[Tensor, Tensor] = triton.quantize(vectors)
        return result
    return reference.quantize(vectors)


@composite("split_rounded")
def split_rounded(rounded: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Take apart, exactly, what `round_to_fp8` returns. Not differentiable.

    Args:
        rounded: [..., J], e4m3 numbers times a power of two for each vector, in a type that
            `quantize` takes. Others are rounded as by `quantize`, without the rotation.
        impl: One of IMPLEMENTATIONS, or None for the default.

    Returns:
        Values [..., J], float8_e4m3fn, and scales [...], float32, whose products are the vectors.
        A scale is what `quantize` would take for the rounded vector, at most that which it took.

    Raises:
        ValueError: On a type or a J that is not taken, or an unknown `impl`.
    """
    return _split(rounded.detach(), _choose("split_rounded", rounded, impl))


@opaque("split_rounded_as", _fake_quantize)
def _split(rounded: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Return values and scales of an implementation."""
    if impl == "triton":
        triton = import_module("megatron_keye.kernels.indexer_quantization.triton")
        result: tuple[Tensor, Tensor] = triton.quantize(rounded, is_rotated=False)
        return result
    return reference.split_rounded(rounded)


@composite("dequantize")
def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values * scales, exactly: no type of VECTOR_DTYPES rounds it.

    Args:
        values: [..., J], float8_e4m3fn.
        scales: [...], float32, powers of two.
        dtype: One of VECTOR_DTYPES.

    Raises:
        ValueError: On another type or shape.
    """
    check_dtypes((torch.float8_e4m3fn,), values=values)
    check_dtypes((torch.float32,), scales=scales)
    if values.shape[:-1] != scales.shape:
        raise ValueError(
            f"scales: got shape {tuple(scales.shape)}, expected {tuple(values.shape[:-1])}, "
            "one for each vector of values"
        )
    if dtype not in VECTOR_DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected float64, float32 or bfloat16")
    return reference.dequantize(values, scales, dtype)


@composite("round_to_fp8")
def round_to_fp8(vectors: Tensor, *, impl: str | None = None) -> Tensor:
    """Return `dequantize(*quantize(vectors))` in the type of `vectors`, differentiable.

    The gradient passes through the rounding as if it were not there, and through the rotation.

    Args:
        vectors: As `quantize` takes them.
        impl: One of IMPLEMENTATIONS, or None for the default.

    Raises:
        ValueError: On a type or a J that is not taken, or an unknown `impl`.
    """
    chosen = _choose("round_to_fp8", vectors, impl)
    autograd = import_module("megatron_keye.kernels.indexer_quantization.autograd")
    rounded: Tensor = autograd.round_to_fp8(vectors, chosen)
    return rounded


def _choose(operator: str, vectors: Tensor, impl: str | None) -> str:
    """Return the implementation, after checking that the vectors can be quantised."""
    chosen = choose_impl(operator, impl, IMPLEMENTATIONS, triton=suits_triton(vectors))
    check_dtypes(VECTOR_DTYPES, vectors=vectors)
    num_channels = vectors.shape[-1] if vectors.ndim > 0 else 0
    if num_channels < 2 or num_channels & (num_channels - 1) != 0:
        raise ValueError(
            f"vectors: got shape {tuple(vectors.shape)}, expected a power of two of channels; "
            "set model.decoder.indexer.head_dim"
        )
    return chosen
