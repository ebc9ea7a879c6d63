# SPDX-License-Identifier: Apache-2.0
"""Eager form of the indexer's 8-bit rounding.

It defines the operator: other implementations must return the same bits, for which the order of
the rotation's additions counts too.

Shape letters: X vectors, J indexer channels.
"""

import torch
from torch import Tensor

from megatron_keye.kernels.precision import accumulation_dtype

SMALLEST_PEAK = 1e-4
"""Largest magnitude that a vector counts as having at least."""
_LARGEST_EXPONENT, _LARGEST_MANTISSA = 9, 0.875
"""448, the largest e4m3 number, is 0.875 * 2^9."""


def rotate(vectors: Tensor) -> Tensor:
    """Return vectors [..., J] times the Hadamard matrix / sqrt(J), which is its own inverse.

    Entry (i, j) of the matrix is -1 where i and j share an odd number of bits, else 1. A step
    handles the lowest bit of the place and moves it to the top, so that log2(J) equal steps bring
    every bit back. Sums in float32 or better, and returns the type of `vectors`.
    """
    num_channels = vectors.shape[-1]
    sums = vectors.to(accumulation_dtype(vectors))
    for _ in range(num_channels.bit_length() - 1):
        even, odd = sums[..., 0::2], sums[..., 1::2]
        sums = torch.cat((even + odd, even - odd), dim=-1)
    factor: float = num_channels**-0.5
    return (sums * factor).to(vectors.dtype)


def quantize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and scales; see api.quantize."""
    return split_rounded(rotate(vectors))


def split_rounded(rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and scales; see api.split_rounded. Rounds what is not rounded yet."""
    wide = rounded.to(accumulation_dtype(rounded))
    peak = wide.abs().amax(dim=-1).clamp(min=SMALLEST_PEAK)
    mantissa, exponent = torch.frexp(peak)
    exponent = exponent - _LARGEST_EXPONENT + (mantissa > _LARGEST_MANTISSA)
    # From its bits, since a GPU's power function need not be exact.
    scales = ((exponent + 127) << 23).view(torch.float32)
    return (wide / scales[..., None]).to(torch.float8_e4m3fn), scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values * scales; see api.dequantize."""
    return (values.float() * scales[..., None]).to(dtype)
