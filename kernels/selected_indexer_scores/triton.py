# SPDX-License-Identifier: Apache-2.0
"""The indexer's scores of selected keys in Triton, forward and backward.

The forward gathers the keys of one query at a time: a key has 128 bytes only. The backward
iterates over the unions of neighbouring queries, since each visit of a key adds a float32 row to
its gradient.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys,
B tiles of queries, U places of a union.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import Blocks, adjacent_channels, check_triton, padded
from megatron_keye.kernels.primitives import (
    load_rows,
    load_union,
    locate_rows,
    selection_slots,
    store_rows,
)
from megatron_keye.kernels.union_lists import TILE_QUERIES, UnionLists

SELECTED_BLOCKS = Blocks(rows=16, keys=64, warps=1, stages=3)
BACKWARD_BLOCKS = Blocks(rows=128, keys=64, warps=8, stages=3, registers=128)
FLOAT32_BLOCKS = Blocks(rows=64, keys=32, warps=8, stages=1)
_MAX_HEADS, _MAX_CHANNELS = 64, 128


def score_selected(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    indices_TK: Tensor,
    *,
    blocks: Blocks = SELECTED_BLOCKS,
) -> Tensor:
    """Return scores_TK; see api.selected_indexer_scores.

    Raises:
        ValueError: More heads or channels than the kernels take, or types that they do not take.
    """
    check_triton("selected_indexer_scores", q_TIJ, q_TIJ=q_TIJ, k_SJ=k_SJ, gate_TI=gate_TI)
    num_queries, num_heads, num_channels = q_TIJ.shape
    if num_heads > _MAX_HEADS or num_channels > _MAX_CHANNELS:
        raise ValueError(
            f"q_TIJ: got {num_heads} heads of {num_channels} channels, expected at most "
            f"{_MAX_HEADS} of {_MAX_CHANNELS} with impl 'triton'; take impl='eager'"
        )
    q_TIJ, k_SJ = adjacent_channels(q_TIJ), adjacent_channels(k_SJ)
    num_selected = indices_TK.shape[1]
    scores_TK = q_TIJ.new_empty((num_queries, num_selected), dtype=torch.float32)
    if scores_TK.numel() == 0:
        return scores_TK
    _selected_kernel[(num_queries,)](
        q_TIJ,
        k_SJ,
        gate_TI,
        indices_TK,
        scores_TK,
        k_SJ.shape[0],
        num_selected,
        num_channels**-0.5,
        *q_TIJ.stride()[:2],
        k_SJ.stride(0),
        *gate_TI.stride(),
        *indices_TK.stride(),
        HEADS=num_heads,
        PADDED_HEADS=padded(num_heads),
        CHANNELS=num_channels,
        PADDED_CHANNELS=padded(num_channels),
        BLOCK_K=blocks.keys,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        maxnreg=blocks.registers,
    )
    return scores_TK


def score_selected_backward(
    dscores_TK: Tensor,
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    lists: UnionLists,
    *,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_TIJ, dk_SJ and dgate_TI in the types of their inputs.

    Args:
        dscores_TK: Gradient of the scores, float32, contiguous.
        q_TIJ: Indexer queries.
        k_SJ: Keys.
        gate_TI: Weights of the heads.
        lists: Unions of the selections; rows of the selection must be ascending.
        blocks: How the work is cut; None for the tuned cut.
    """
    num_queries, num_heads, num_channels = q_TIJ.shape
    q_TIJ, k_SJ = adjacent_channels(q_TIJ), adjacent_channels(k_SJ)
    padded_heads = padded(num_heads)
    if blocks is None:
        blocks = FLOAT32_BLOCKS if q_TIJ.dtype == torch.float32 else BACKWARD_BLOCKS
    queries = max(1, min(TILE_QUERIES, blocks.rows // padded_heads))
    dq_TIJ = torch.empty_like(q_TIJ, memory_format=torch.contiguous_format)
    dgate_TI = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
    dk_SJ = torch.zeros(k_SJ.shape, dtype=torch.float32, device=k_SJ.device)
    if num_queries > 0:
        num_tiles = lists.counts_B.numel()
        _selected_backward_kernel[(num_tiles * (TILE_QUERIES // queries),)](
            dscores_TK,
            q_TIJ,
            k_SJ,
            gate_TI,
            dq_TIJ,
            dk_SJ,
            dgate_TI,
            *lists,
            num_queries,
            dscores_TK.shape[1],
            lists.keys_BU.shape[1],
            num_channels**-0.5,
            *q_TIJ.stride()[:2],
            k_SJ.stride(0),
            *gate_TI.stride(),
            TILE=TILE_QUERIES,
            QUERIES=queries,
            HEADS=num_heads,
            PADDED_HEADS=padded_heads,
            CHANNELS=num_channels,
            PADDED_CHANNELS=padded(num_channels),
            BLOCK_U=blocks.keys,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            maxnreg=blocks.registers,
        )
    return dq_TIJ, dk_SJ.to(k_SJ.dtype), dgate_TI


@triton.jit
def _selected_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gate: tl.tensor,
    indices: tl.tensor,
    scores: tl.tensor,
    num_keys: int,
    num_selected: int,
    scale: float,
    q_stride_t: int,
    q_stride_i: int,
    k_stride_s: int,
    gate_stride_t: int,
    gate_stride_i: int,
    index_stride_t: int,
    index_stride_k: int,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    scale = tl.cast(scale, tl.float32)  # torch.compile gives float64
    query = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED_HEADS)
    is_head = head < HEADS
    q_row = q + query * q_stride_t
    q_tile = load_rows(q_row, head * q_stride_i, is_head, CHANNELS, PADDED_CHANNELS)
    weight = tl.load(gate + query * gate_stride_t + head * gate_stride_i, is_head, other=0.0)
    weight = weight.to(tl.float32) * scale
    for first in range(0, num_selected, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        is_place = place < num_selected
        row = indices + query * index_stride_t
        index = tl.load(row + place * index_stride_k, is_place, other=-1).to(tl.int64)
        is_real = (index >= 0) & (index < num_keys)
        k_tile = load_rows(k, index * k_stride_s, is_real, CHANNELS, PADDED_CHANNELS)
        dots = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        score = tl.sum(weight[:, None] * tl.maximum(dots, 0.0), 0)
        score = tl.where(is_real, score, -float("inf"))
        tl.store(scores + query * num_selected + place, score, is_place)


@triton.jit
def _selected_backward_kernel(
    dscores: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    gate: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dgate: tl.tensor,
    keys: tl.tensor,
    masks: tl.tensor,
    counts: tl.tensor,
    num_queries: int,
    num_selected: int,
    capacity: int,
    scale: float,
    q_stride_t: int,
    q_stride_i: int,
    k_stride_s: int,
    gate_stride_t: int,
    gate_stride_i: int,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_U: tl.constexpr,
) -> None:
    scale = tl.cast(scale, tl.float32)  # torch.compile gives float64
    ROWS: tl.constexpr = QUERIES * PADDED_HEADS
    tile, query, head, is_row, _ = locate_rows(num_queries, TILE, QUERIES, HEADS, PADDED_HEADS)
    q_offset = query * q_stride_t + head * q_stride_i
    q_tile = load_rows(q, q_offset, is_row, CHANNELS, PADDED_CHANNELS)
    weight = tl.load(gate + query * gate_stride_t + head * gate_stride_i, is_row, other=0.0)
    weight = weight.to(tl.float32) * scale
    # One row of places for each query.
    local = tl.program_id(0) % (TILE // QUERIES) * QUERIES + tl.arange(0, QUERIES)
    is_query = tile * TILE + local < num_queries
    dscores_row = dscores + (tile * TILE + local)[:, None] * num_selected
    dq_tile = tl.zeros([ROWS, PADDED_CHANNELS], tl.float32)
    dweight = tl.zeros([ROWS], tl.float32)
    num_before = tl.zeros([QUERIES], tl.int32)
    own_bits = tl.sum(1 << local, 0)
    channel = tl.arange(0, PADDED_CHANNELS)
    count = tl.load(counts + tile)
    for start in range(0, count, BLOCK_U):
        key, word, is_real = load_union(keys, masks, tile * capacity, start, count, BLOCK_U)
        k_tile = load_rows(k, key * k_stride_s, is_real, CHANNELS, PADDED_CHANNELS)
        slot, is_selected, num_before = selection_slots(word, local, num_before)
        dscore = tl.load(dscores_row + slot, is_selected & is_query[:, None], other=0.0)
        dscore = tl.broadcast_to(dscore[:, None, :], [QUERIES, PADDED_HEADS, BLOCK_U])
        dscore = tl.reshape(dscore, [ROWS, BLOCK_U])
        dots = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        dweight += tl.sum(dscore * tl.maximum(dots, 0.0), 1)
        ddots = tl.where(dots > 0, dscore * weight[:, None], 0.0).to(k_tile.dtype)
        dk_tile = tl.dot(tl.trans(ddots), q_tile, input_precision="ieee")
        # Keys that only other queries of the tile selected would get zeros.
        in_k = ((word & own_bits) != 0)[:, None] & (channel < CHANNELS)[None, :]
        tl.atomic_add(
            dk + key[:, None] * CHANNELS + channel[None, :], dk_tile, in_k, sem="relaxed"
        )
        dq_tile = tl.dot(ddots, k_tile, dq_tile, input_precision="ieee")
    row_offset = query * HEADS + head
    tl.store(dgate + row_offset, (dweight * scale).to(dgate.dtype.element_ty), is_row)
    store_rows(dq, row_offset * CHANNELS, dq_tile, is_row, CHANNELS, PADDED_CHANNELS)
