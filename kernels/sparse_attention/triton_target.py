"""The indexer's target in Triton: what each query's heads gave to each key that it selected.

Walks the unions of the forward once more with the sums that the forward found, without values.
Apart from the forward because only training asks for it.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
K selected keys, B tiles of queries, U places of a union.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import Blocks
from megatron_keye.kernels.sparse_attention.triton import (
    choose_blocks,
    lay_out_rows,
    load_union,
    locate_rows,
)
from megatron_keye.kernels.union_lists import UnionLists

TARGET_BLOCKS = Blocks(rows=128, keys=64, warps=8, stages=2, registers=128)
_BLOCK_K = 64
"""Places of a row that are filled with zeros at once."""


def recover_target(
    q_THC: Tensor,
    k_SGC: Tensor,
    lse_TH: Tensor,
    lists: UnionLists,
    num_selected: int,
    *,
    scale: float,
    blocks: Blocks | None = None,
) -> Tensor:
    """Return target_TGK, the mean over a group's heads of each softmax; see api.sparse_attention.

    Args:
        q_THC: Queries; channels adjacent.
        k_SGC: Keys; channels adjacent.
        lse_TH: From `attend`.
        lists: Unions of the selections, whose rows are ascending and padded last.
        num_selected: K, places of a row of the selection.
        scale: Factor of the logits.
        blocks: How the work is cut; None for the tuned cut.
    """
    blocks = blocks or choose_blocks(TARGET_BLOCKS, q_THC.dtype)
    num_queries, num_groups = q_THC.shape[0], k_SGC.shape[1]
    layout = lay_out_rows(q_THC, num_groups, blocks)
    target_TGK = lse_TH.new_empty((num_queries, num_groups, num_selected))
    if target_TGK.numel() > 0:
        _target_kernel[layout.grid(num_queries, num_groups)](
            q_THC,
            k_SGC,
            lse_TH,
            target_TGK,
            *lists,
            num_queries,
            num_selected,
            lists.keys_BU.shape[1],
            scale * math.log2(math.e),
            *q_THC.stride()[:2],
            *k_SGC.stride()[:2],
            **layout.constants(),
            BLOCK_U=blocks.keys,
            BLOCK_K=_BLOCK_K,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            maxnreg=blocks.registers,
        )
    return target_TGK


@triton.jit
def _target_kernel(
    q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    target: tl.tensor,
    keys: tl.tensor,
    masks: tl.tensor,
    counts: tl.tensor,
    num_queries: int,
    num_selected: int,
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
    BLOCK_K: tl.constexpr,
) -> None:
    tile, query, head, is_row, _ = locate_rows(num_queries, TILE, QUERIES, HEADS, PADDED_HEADS)
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    channel = tl.arange(0, PADDED_CHANNELS)
    is_channel = channel < CHANNELS
    in_q = is_row[:, None] & is_channel[None, :]
    q_offset = query * q_stride_t + head * q_stride_h
    q_tile = tl.load(q + q_offset[:, None] + channel[None, :], in_q, other=0.0)
    # +inf makes the weights of rows that are not real 0.
    row_lse = tl.load(lse + query * (num_groups * HEADS) + head, is_row, other=float("inf"))
    k_group = k + group * k_stride_g + channel[None, :]
    # One row of places for each query.
    local = tl.program_id(0) % (TILE // QUERIES) * QUERIES + tl.arange(0, QUERIES)
    is_query = tile * TILE + local < num_queries
    target_row = target + ((tile * TILE + local) * num_groups + group)[:, None] * num_selected
    num_before = tl.zeros([QUERIES], tl.int32)
    count = tl.load(counts + tile)
    for start in range(0, count, BLOCK_U):
        key, word, is_real = load_union(keys, masks, tile * capacity, start, count, BLOCK_U)
        in_k = is_real[:, None] & is_channel[None, :]
        k_tile = tl.load(k_group + key[:, None] * k_stride_s, in_k, other=0.0)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
        weights = tl.exp2(logits - row_lse[:, None])
        mean = tl.sum(tl.reshape(weights, [QUERIES, PADDED_HEADS, BLOCK_U]), 1) / HEADS
        # Rows are ascending, so a key's place in its row is the number of selected keys before.
        is_selected = (word[None, :] >> local[:, None]) & 1
        slot = num_before[:, None] + tl.cumsum(is_selected, 1) - 1
        num_before += tl.sum(is_selected, 1)
        tl.store(target_row + slot, mean, (is_selected != 0) & is_query[:, None])
    for start in range(tl.min(num_before) // BLOCK_K * BLOCK_K, num_selected, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)[None, :]
        is_padding = (slot >= num_before[:, None]) & (slot < num_selected)
        tl.store(target_row + slot, slot * 0.0, is_padding & is_query[:, None])
