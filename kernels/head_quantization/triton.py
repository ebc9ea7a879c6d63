# SPDX-License-Identifier: Apache-2.0
"""The rounding of keys and values to 8 bits in Triton: a program takes a block of heads.

Shape letters: X heads of tokens, C channels of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.head_quantization.reference import INVERSE_LARGEST, SMALLEST_PEAK
from megatron_keye.kernels.launch import check_triton, padded
from megatron_keye.kernels.primitives import load_rows, store_rows

_BLOCK_ENTRIES = 4096
"""Entries of a program's block."""


def quantize_heads(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and scales; see api.quantize_heads."""
    check_triton("quantize_heads", heads, heads=heads)
    values = torch.empty_like(
        heads, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format
    )
    scales = heads.new_empty(heads.shape[:-1], dtype=torch.float32)
    _launch(_quantize_kernel, heads, values, scales, SMALLEST_PEAK, INVERSE_LARGEST)
    return values, scales


def dequantize_heads(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the heads; see api.dequantize_heads."""
    heads = torch.empty_like(values, dtype=dtype, memory_format=torch.contiguous_format)
    check_triton("dequantize_heads", heads, heads=heads)
    _launch(_dequantize_kernel, values, heads, scales.contiguous())
    return heads


def _launch(
    kernel: triton.JITFunction, source: Tensor, target: Tensor, scales: Tensor, *numbers: float
) -> None:
    """Run a kernel over all heads."""
    num_channels = source.shape[-1]
    block = max(1, _BLOCK_ENTRIES // padded(num_channels))
    if scales.numel() > 0:
        kernel[(triton.cdiv(scales.numel(), block),)](
            source.contiguous(),
            target,
            scales,
            scales.numel(),
            *numbers,
            CHANNELS=num_channels,
            PADDED_CHANNELS=padded(num_channels),
            BLOCK_X=block,
            num_warps=4,
        )


@triton.jit
def _quantize_kernel(
    heads: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    num_heads: int,
    smallest_peak: float,
    inverse_largest: float,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    is_head = head < num_heads
    tile = load_rows(heads, head * CHANNELS, is_head, CHANNELS, PADDED_CHANNELS).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(tile), 1), smallest_peak)
    scale = peak * tl.cast(inverse_largest, tl.float32)  # torch.compile gives float64
    tl.store(scales + head, scale, is_head)
    rounded = tl.div_rn(tile, tl.broadcast_to(scale[:, None], tile.shape)).to(tl.float8e4nv)
    store_rows(values, head * CHANNELS, rounded, is_head, CHANNELS, PADDED_CHANNELS)


@triton.jit
def _dequantize_kernel(
    values: tl.tensor,
    heads: tl.tensor,
    scales: tl.tensor,
    num_heads: int,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    is_head = head < num_heads
    tile = load_rows(values, head * CHANNELS, is_head, CHANNELS, PADDED_CHANNELS).to(tl.float32)
    tile *= tl.load(scales + head, is_head, other=0.0)[:, None]
    store_rows(heads, head * CHANNELS, tile, is_head, CHANNELS, PADDED_CHANNELS)
