# SPDX-License-Identifier: Apache-2.0
"""Sparse attention in Triton: a program attends for the queries of one tile and one group.

Rows of a tile are query * heads + head. The program iterates over the union of its queries'
selections, loads each key once for all of them, and masks by bits what a query did not select.
This raises the arithmetic intensity: one query alone has 8 FLOP per byte that it gathers.

Keys that no query of a tile selected are never loaded. A NaN in a key or value that was
selected by one query also reaches the others of its tile (0 * NaN).

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys, B tiles of queries, U places of a union.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import Blocks, adjacent_channels, padded, same_strides
from megatron_keye.kernels.primitives import (
    load_rows,
    load_union,
    locate_rows,
    online_softmax_update,
    store_rows,
)
from megatron_keye.kernels.union_lists import TILE_QUERIES, UnionLists

_MAX_HEADS, _MAX_CHANNELS = 128, 256
_TUNED_CHANNELS = 128


FORWARD_BLOCKS = Blocks(rows=128, keys=64, warps=8, stages=2, registers=128)
"""At most 128 registers, so that two programs share a multiprocessor: 1.5 times as fast."""
FLOAT32_BLOCKS = Blocks(rows=64, keys=32, warps=8, stages=1)
"""Float32 takes twice the room and no tensor core: for tests and small models."""


class RowLayout(NamedTuple):
    """Sizes that a kernel is compiled for."""

    heads: int
    """Query heads of a group."""
    padded_heads: int
    queries: int
    """Queries of a program; a tile's union serves TILE_QUERIES / queries programs."""
    channels: int
    padded_channels: int

    def grid(self, num_queries: int, num_groups: int) -> tuple[int, int]:
        """Return programs (parts of tiles, groups); the group is outermost.

        One group's keys and values fit into the L2 cache where those of all groups do not.
        """
        num_tiles = -(-num_queries // TILE_QUERIES)
        return num_tiles * (TILE_QUERIES // self.queries), num_groups

    def constants(self) -> dict[str, int]:
        """Return the compile-time arguments that every kernel here takes."""
        return {
            "TILE": TILE_QUERIES,
            "QUERIES": self.queries,
            "HEADS": self.heads,
            "PADDED_HEADS": self.padded_heads,
            "CHANNELS": self.channels,
            "PADDED_CHANNELS": self.padded_channels,
        }


def lay_out_rows(q_THC: Tensor, num_groups: int, blocks: Blocks) -> RowLayout:
    """Return how rows are laid out.

    Raises:
        ValueError: More heads in a group or channels in a head than the kernels take.
    """
    heads, channels = q_THC.shape[1] // num_groups, q_THC.shape[2]
    if heads > _MAX_HEADS or channels > _MAX_CHANNELS:
        raise ValueError(
            f"sparse_attention: impl 'triton' got {heads} heads a group of {channels} channels, "
            f"expected at most {_MAX_HEADS} of {_MAX_CHANNELS}; take impl='eager'"
        )
    padded_heads = padded(heads, smallest=1)
    queries = min(TILE_QUERIES, max(1, blocks.rows // padded_heads))
    return RowLayout(heads, padded_heads, queries, channels, padded(channels))


def lay_out_heads(q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as the kernels take them, copied only where they are not.

    Channels are adjacent, and keys and values have the same strides.
    """
    q_THC, k_SGC, v_SGC = (adjacent_channels(tensor) for tensor in (q_THC, k_SGC, v_SGC))
    return q_THC, *same_strides(k_SGC, v_SGC)


def choose_blocks(tuned: Blocks, q_THC: Tensor) -> Blocks:
    """Return the blocks for such queries.

    Wider heads than the tuned ones fill a multiprocessor with one program, which may then have
    all registers.
    """
    if q_THC.dtype == torch.float32:
        return FLOAT32_BLOCKS
    if q_THC.shape[2] <= _TUNED_CHANNELS:
        return tuned
    return tuned._replace(rows=tuned.rows // 2, stages=2, registers=None)


def attend(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    lists: UnionLists,
    *,
    scale: float,
    scales: tuple[Tensor, Tensor] | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH.

    Args:
        q_THC: Queries; channels adjacent.
        k_SGC: Keys; channels adjacent.
        v_SGC: Values; strides of `k_SGC`.
        lists: Unions of the selections.
        scale: Factor of the logits.
        scales: Of e4m3 keys and of e4m3 values [S, G], contiguous float32; None for other types.
        blocks: How the work is cut; None for the tuned cut.

    Returns:
        The output, and float32 log2 of each row's sum of exponentials, +inf without any key.
    """
    blocks = blocks or choose_blocks(FORWARD_BLOCKS, q_THC)
    num_queries, num_groups = q_THC.shape[0], k_SGC.shape[1]
    layout = lay_out_rows(q_THC, num_groups, blocks)
    out_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
    lse_TH = q_THC.new_empty(q_THC.shape[:2], dtype=torch.float32)
    k_scales_SG, v_scales_SG = scales or (None, None)
    if num_queries > 0:
        _forward_kernel[layout.grid(num_queries, num_groups)](
            q_THC,
            k_SGC,
            k_scales_SG,
            v_SGC,
            v_scales_SG,
            out_THC,
            lse_TH,
            *lists,
            num_queries,
            lists.keys_BU.shape[1],
            scale * math.log2(math.e),
            *q_THC.stride()[:2],
            *k_SGC.stride()[:2],
            **layout.constants(),
            BLOCK_U=blocks.keys,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            maxnreg=blocks.registers,
        )
    return out_THC, lse_TH


@triton.jit
def _forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    k_scales: tl.tensor | None,
    v: tl.tensor,
    v_scales: tl.tensor | None,
    out: tl.tensor,
    lse: tl.tensor,
    keys: tl.tensor,
    masks: tl.tensor,
    counts: tl.tensor,
    num_queries: int,
    capacity: int,
    scale_log2: float,
    q_stride_t: int,
    q_stride_h: int,
    k_stride_s: int,
    k_stride_g: int,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_U: tl.constexpr,
) -> None:
    scale_log2 = tl.cast(scale_log2, tl.float32)  # torch.compile gives float64
    tile, query, head, is_row, local = locate_rows(num_queries, TILE, QUERIES, HEADS, PADDED_HEADS)
    bit = 1 << local
    group = tl.program_id(1)
    head += group * HEADS
    q_offset = query * q_stride_t + head * q_stride_h
    q_tile = load_rows(q, q_offset, is_row, CHANNELS, PADDED_CHANNELS)
    k_group, v_group = k + group * k_stride_g, v + group * k_stride_g
    # Finite, so that a row without any key never computes inf - inf.
    m_i = tl.full([QUERIES * PADDED_HEADS], -1.0e38, tl.float32)
    l_i = tl.zeros([QUERIES * PADDED_HEADS], tl.float32)
    acc = tl.zeros([QUERIES * PADDED_HEADS, PADDED_CHANNELS], tl.float32)
    count = tl.load(counts + tile)
    for start in range(0, count, BLOCK_U):
        key, word, is_real = load_union(keys, masks, tile * capacity, start, count, BLOCK_U)
        k_tile = load_rows(k_group, key * k_stride_s, is_real, CHANNELS, PADDED_CHANNELS)
        v_tile = load_rows(v_group, key * k_stride_s, is_real, CHANNELS, PADDED_CHANNELS)
        # 8 bits fit into the queries' type; a scale factors out of its key's products.
        k_tile, v_tile = k_tile.to(q_tile.dtype), v_tile.to(q_tile.dtype)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
        v_scale = None
        if k_scales is not None:
            place = key * tl.num_programs(1) + group
            logits *= tl.load(k_scales + place, is_real, other=0.0)[None, :]
            v_scale = tl.load(v_scales + place, is_real, other=0.0)
        logits = tl.where((word[None, :] & bit[:, None]) != 0, logits, -float("inf"))
        m_i, l_i, acc = online_softmax_update(m_i, l_i, acc, logits, v_tile, v_scale)
    has_keys = l_i > 0
    out_tile = acc / tl.where(has_keys, l_i, 1.0)[:, None]
    row_lse = tl.where(has_keys, m_i + tl.log2(l_i), float("inf"))
    row = query * (tl.num_programs(1) * HEADS) + head
    tl.store(lse + row, row_lse, is_row)
    store_rows(out, row * CHANNELS, out_tile, is_row, CHANNELS, PADDED_CHANNELS)
