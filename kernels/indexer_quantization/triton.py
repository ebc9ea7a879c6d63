# SPDX-License-Identifier: Apache-2.0
"""The indexer's 8-bit rounding in Triton: a program rotates and rounds a block of vectors.

One kernel for the values that inference keeps, the numbers that training computes with, the
gradient, which is rotated alone, and numbers taken apart, which are rounded already.

Shape letters: X vectors, J indexer channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.indexer_quantization.reference import SMALLEST_PEAK
from megatron_keye.kernels.launch import check_triton

_BLOCK_ENTRIES = 4096
"""Entries of a program's block."""


def quantize(vectors: Tensor, *, is_rotated: bool = True) -> tuple[Tensor, Tensor]:
    """Return values and scales; see api.quantize, and without rotation api.split_rounded."""
    values = torch.empty_like(
        vectors, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format
    )
    scales = vectors.new_empty(vectors.shape[:-1], dtype=torch.float32)
    _launch(vectors, values, scales, is_rotated=is_rotated, is_rounded=True)
    return values, scales


def rotate(vectors: Tensor, *, is_rounded: bool) -> Tensor:
    """Return the rotated vectors in their own type, rounded to what `quantize` keeps or not."""
    out = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    _launch(vectors, out, None, is_rotated=True, is_rounded=is_rounded)
    return out


def _launch(
    vectors: Tensor, out: Tensor, scales: Tensor | None, *, is_rotated: bool, is_rounded: bool
) -> None:
    """Fill `out`, and `scales` where there are any."""
    check_triton("indexer_quantization", vectors, vectors=vectors)
    num_channels = vectors.shape[-1]
    num_vectors = vectors.numel() // num_channels
    block = max(1, _BLOCK_ENTRIES // num_channels)
    if num_vectors > 0:
        _rotate_kernel[(triton.cdiv(num_vectors, block),)](
            vectors.contiguous(),
            out,
            scales,
            num_vectors,
            num_channels**-0.5 if is_rotated else 1.0,
            CHANNELS=num_channels,
            STEPS=num_channels.bit_length() - 1 if is_rotated else 0,
            SMALLEST_PEAK=SMALLEST_PEAK,
            ROUND=is_rounded,
            BLOCK_X=block,
            num_warps=4,
        )


@triton.jit
def _rotate_kernel(
    vectors: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor | None,
    num_vectors: int,
    factor: float,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    SMALLEST_PEAK: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    factor = tl.cast(factor, tl.float32)  # torch.compile gives float64
    vector = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    place = vector[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_real = (vector < num_vectors)[:, None] & (tl.arange(0, CHANNELS) >= 0)[None, :]
    sums = tl.load(vectors + place, is_real, other=0.0).to(tl.float32)
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(sums, [BLOCK_X, CHANNELS // 2, 2]))
        joined = tl.join(even + odd, even - odd)
        sums = tl.reshape(tl.permute(joined, (0, 2, 1)), [BLOCK_X, CHANNELS])
    rotated = (sums * factor).to(vectors.dtype.element_ty)
    if ROUND:
        wide = rotated.to(tl.float32)
        peak = tl.maximum(tl.max(tl.abs(wide), 1), SMALLEST_PEAK)
        bits = peak.to(tl.int32, bitcast=True)
        # 448 = 1.75 * 2^8: a larger mantissa needs the next power of two.
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        values = (wide * inverse[:, None]).to(tl.float8e4nv)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        if scales is not None:
            tl.store(scales + vector, scale, vector < num_vectors)
            tl.store(out + place, values, is_real)
        else:
            rounded = values.to(tl.float32) * scale[:, None]
            tl.store(out + place, rounded.to(out.dtype.element_ty), is_real)
    else:
        tl.store(out + place, rotated, is_real)
