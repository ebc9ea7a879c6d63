# SPDX-License-Identifier: Apache-2.0
"""The rotary positions in Triton: a program rotates all heads of a few tokens.

It holds the tokens' cosines and sines in registers, so that each is read once.

Shape letters: T tokens or patches, H heads, C channels of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import adjacent_channels, padded

_BLOCK_PAIRS = 512
"""Pairs of channels that a program rotates at once, of one head."""


def rotate_heads(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, is_backward: bool) -> Tensor:
    """Return the heads rotated, or rotated back as gradients are.

    Args:
        x_THC: Heads, or the gradient of rotated ones.
        cos_TC: Contiguous.
        sin_TC: Contiguous.
        is_backward: Whether the transpose of the rotation is applied.
    """
    x_THC = adjacent_channels(x_THC)
    out_THC = torch.empty_like(x_THC, memory_format=torch.contiguous_format)
    num_tokens, num_heads, num_channels = x_THC.shape
    pairs = padded(num_channels // 2, smallest=1)
    block = max(1, _BLOCK_PAIRS // pairs)
    if out_THC.numel() > 0:
        _rotate_kernel[(triton.cdiv(num_tokens, block),)](
            x_THC,
            cos_TC,
            sin_TC,
            out_THC,
            num_tokens,
            num_heads,
            x_THC.stride(0),
            x_THC.stride(1),
            PAIRS=num_channels // 2,
            BLOCK_T=block,
            BLOCK_PAIRS=pairs,
            IS_BACKWARD=is_backward,
            num_warps=4,
        )
    return out_THC


@triton.jit
def _rotate_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    num_tokens: int,
    num_heads: int,
    token_stride: int,
    head_stride: int,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    is_real = (token < num_tokens) & (pair < PAIRS)
    angle = token * 2 * PAIRS + pair
    # Of the first and of the second half of the channels.
    cos1, cos2 = tl.load(cos + angle, is_real), tl.load(cos + angle + PAIRS, is_real)
    sin1, sin2 = tl.load(sin + angle, is_real), tl.load(sin + angle + PAIRS, is_real)
    if IS_BACKWARD:
        sin1, sin2 = -sin2, -sin1
    for head in range(num_heads):
        read = x + token * token_stride + head * head_stride + pair
        first = tl.load(read, is_real).to(tl.float32)
        second = tl.load(read + PAIRS, is_real).to(tl.float32)
        rotated1 = first * cos1 - second * sin1
        rotated2 = second * cos2 + first * sin2
        write = out + (token * num_heads + head) * 2 * PAIRS + pair
        tl.store(write, rotated1.to(out.dtype.element_ty), is_real)
        tl.store(write + PAIRS, rotated2.to(out.dtype.element_ty), is_real)
