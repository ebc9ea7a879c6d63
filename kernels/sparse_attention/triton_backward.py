# SPDX-License-Identifier: Apache-2.0
"""Backward of the sparse attention in Triton, over the same tiles and unions as the forward.

Each program recomputes its weights, keeps dQ, and adds dK and dV of every key that it visits to
float32 sums in memory. The order of those additions varies from run to run; the deterministic
form adds integers instead, whose sum has no order. The sums of one key-value head lie together,
those of a key side by side, and keys of three steps are on their way: 142 ms at 128K tokens
instead of 158 (one H100, docs/benchmarks).

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
B tiles of queries, U places of a union.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import Blocks
from megatron_keye.kernels.primitives import load_rows, load_union, locate_rows, store_rows
from megatron_keye.kernels.sparse_attention.triton import choose_blocks, lay_out_rows
from megatron_keye.kernels.union_lists import UnionLists

BACKWARD_BLOCKS = Blocks(rows=128, keys=32, warps=8, stages=3, registers=128)
"""Two programs per multiprocessor: while one waits for its additions, the other multiplies."""
_INTEGER_BITS = 60
"""Bits that a deterministic sum may use: 63, less room for rounding in the bounds."""


def attend_backward(
    dout_THC: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_TH: Tensor,
    lists: UnionLists,
    *,
    scale: float,
    is_deterministic: bool,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_THC, dk_SGC and dv_SGC in the types of `q_THC` and `k_SGC`.

    Args:
        dout_THC: Gradient of the output, contiguous.
        q_THC: Queries; channels adjacent.
        k_SGC: Keys; channels adjacent.
        v_SGC: Values; strides of `k_SGC`.
        out_THC: From `attend`.
        lse_TH: From `attend`.
        lists: Unions of the selections.
        scale: Factor of the logits.
        is_deterministic: Whether dK and dV are summed as 64-bit integers: the same bits at
            every call, twice the memory traffic.
        blocks: How the work is cut; None for the tuned cut.
    """
    blocks = blocks or choose_blocks(BACKWARD_BLOCKS, q_THC)
    num_queries, num_groups = q_THC.shape[0], k_SGC.shape[1]
    dq_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
    layout = lay_out_rows(q_THC, num_groups, blocks)
    dk_SGC, dv_SGC = _new_sums(k_SGC, torch.int64 if is_deterministic else torch.float32)
    if num_queries > 0:
        units = (
            _integer_units(dout_THC, q_THC, v_SGC, scale, num_groups)
            if is_deterministic
            else lse_TH  # not read
        )
        _backward_kernel[layout.grid(num_queries, num_groups)](
            q_THC,
            k_SGC,
            v_SGC,
            out_THC,
            dout_THC,
            lse_TH,
            dq_THC,
            dk_SGC,
            dv_SGC,
            units,
            *lists,
            num_queries,
            lists.keys_BU.shape[1],
            scale,
            scale * math.log2(math.e),
            *q_THC.stride()[:2],
            *k_SGC.stride()[:2],
            *dk_SGC.stride()[:2],
            **layout.constants(),
            BLOCK_U=blocks.keys,
            IN_INTEGERS=is_deterministic,
            WIDE_SUMS=len(dk_SGC) * dk_SGC.stride(0) >= 2**31,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            maxnreg=blocks.registers,
        )
        if is_deterministic:
            dk_SGC, dv_SGC = dk_SGC.double() / units[0], dv_SGC.double() / units[1]
    dk_SGC, dv_SGC = (each.to(k_SGC.dtype).contiguous() for each in (dk_SGC, dv_SGC))
    return dq_THC, dk_SGC, dv_SGC


def _new_sums(k_SGC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return zeros for dK and dV, both [S, G, C] with the strides of [G, S, 2, C] in memory."""
    num_keys, num_groups, num_channels = k_SGC.shape
    shape = num_groups, num_keys, 2, num_channels
    sums_SG2C = torch.zeros(shape, dtype=dtype, device=k_SGC.device).transpose(0, 1)
    dk_SGC, dv_SGC = sums_SG2C.unbind(dim=2)
    return dk_SGC, dv_SGC


def _integer_units(
    dout_THC: Tensor, q_THC: Tensor, v_SGC: Tensor, scale: float, num_groups: int
) -> Tensor:
    """Return by which powers of two dK and dV are multiplied, so that no sum can overflow.

    Every row adds to a key at most once, with a weight of at most 1.
    """
    num_rows = q_THC.shape[0] * q_THC.shape[1] // num_groups
    dout, q, v = (tensor.detach().abs().max().double() for tensor in (dout_THC, q_THC, v_SGC))
    dv_bound = num_rows * dout
    dk_bound = dv_bound * 2 * q_THC.shape[2] * v * q * abs(scale)
    bounds = torch.stack([dk_bound, dv_bound]).clamp(min=2.0**-60)
    return torch.exp2(_INTEGER_BITS - bounds.log2().ceil()).float()


@triton.jit
def _add(
    sums: tl.tensor, value: tl.tensor, mask: tl.tensor, unit: tl.tensor, IN_INTEGERS: tl.constexpr
) -> None:
    """Add a tile to sums in memory."""
    if IN_INTEGERS:
        tl.atomic_add(sums, (value * unit).to(tl.int64), mask, sem="relaxed")
    else:
        tl.atomic_add(sums, value, mask, sem="relaxed")


@triton.jit
def _backward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    dout: tl.tensor,
    lse: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    units: tl.tensor,
    keys: tl.tensor,
    masks: tl.tensor,
    counts: tl.tensor,
    num_queries: int,
    capacity: int,
    scale: float,
    scale_log2: float,
    q_stride_t: int,
    q_stride_h: int,
    k_stride_s: int,
    k_stride_g: int,
    sum_stride_s: int,
    sum_stride_g: int,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    IN_INTEGERS: tl.constexpr,
    WIDE_SUMS: tl.constexpr,
) -> None:
    scale = tl.cast(scale, tl.float32)  # torch.compile gives float64
    scale_log2 = tl.cast(scale_log2, tl.float32)  # torch.compile gives float64
    tile, query, head, is_row, local = locate_rows(num_queries, TILE, QUERIES, HEADS, PADDED_HEADS)
    bit = 1 << local
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    head += group * HEADS
    q_offset = query * q_stride_t + head * q_stride_h
    q_tile = load_rows(q, q_offset, is_row, CHANNELS, PADDED_CHANNELS)
    row = query * (num_groups * HEADS) + head
    dout_tile = load_rows(dout, row * CHANNELS, is_row, CHANNELS, PADDED_CHANNELS)
    out_tile = load_rows(out, row * CHANNELS, is_row, CHANNELS, PADDED_CHANNELS)
    mean = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    row_lse = tl.load(lse + row, is_row, other=float("inf"))
    k_group, v_group = k + group * k_stride_g, v + group * k_stride_g
    channel = tl.arange(0, PADDED_CHANNELS)
    is_channel = channel < CHANNELS
    dk_group = dk + group.to(tl.int64) * sum_stride_g + channel[None, :]
    dv_group = dv + group.to(tl.int64) * sum_stride_g + channel[None, :]
    dk_unit = 1.0
    dv_unit = 1.0
    if IN_INTEGERS:
        dk_unit = tl.load(units)
        dv_unit = tl.load(units + 1)
    dq_tile = tl.zeros([QUERIES * PADDED_HEADS, PADDED_CHANNELS], tl.float32)
    count = tl.load(counts + tile)
    for start in range(0, count, BLOCK_U):
        key, word, is_real = load_union(keys, masks, tile * capacity, start, count, BLOCK_U)
        in_k = is_real[:, None] & is_channel[None, :]
        k_tile = load_rows(k_group, key * k_stride_s, is_real, CHANNELS, PADDED_CHANNELS)
        v_tile = load_rows(v_group, key * k_stride_s, is_real, CHANNELS, PADDED_CHANNELS)
        near = key if WIDE_SUMS else key.to(tl.int32)  # in half the registers
        sums = near[:, None] * sum_stride_s
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
        weights = tl.exp2(logits - row_lse[:, None])
        weights = tl.where((word[None, :] & bit[:, None]) != 0, weights, 0.0)
        # Channels as rows of the product: a step may then have fewer keys than 64.
        dv_tile = tl.dot(tl.trans(dout_tile), weights.to(k_tile.dtype), input_precision="ieee")
        _add(dv_group + sums, tl.trans(dv_tile), in_k, dv_unit, IN_INTEGERS)
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        dlogits = (weights * (dweights - mean[:, None])).to(k_tile.dtype)
        dk_tile = tl.dot(tl.trans(q_tile), dlogits, input_precision="ieee") * scale
        _add(dk_group + sums, tl.trans(dk_tile), in_k, dk_unit, IN_INTEGERS)
        dq_tile = tl.dot(dlogits, k_tile, dq_tile, input_precision="ieee")
    store_rows(dq, row * CHANNELS, dq_tile * scale, is_row, CHANNELS, PADDED_CHANNELS)
