# SPDX-License-Identifier: Apache-2.0
"""Log-sum-exp of the attention's logits in Triton: attention without values.

The mean over heads of their softmax needs every head's own sum of exponentials first.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
B tiles of queries.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.dense_indexer_loss.triton.ranges import load_ranges, mask_block
from megatron_keye.kernels.dense_indexer_loss.triton.tiles import (
    DenseInputs,
    launch_constants,
    load_block,
    locate_block,
)
from megatron_keye.kernels.launch import Blocks

LSE_BLOCKS = Blocks(rows=128, keys=64, warps=4, stages=2, registers=168)


def attention_lse(inputs: DenseInputs, spans_B4: Tensor, *, scale: float) -> Tensor:
    """Return lse_TH, float32 log2 of each head's sum of exponentials; +inf without any key.

    Args:
        inputs: From `checked`.
        spans_B4: From `span_tiles`.
        scale: Factor of the logits.
    """
    blocks = inputs.blocks(LSE_BLOCKS)
    num_queries, num_keys = inputs.sizes()
    num_heads = inputs.query_THC.shape[1]
    lse_TH = inputs.query_THC.new_empty((num_queries, num_heads), dtype=torch.float32)
    constants = inputs.constants()
    _lse_kernel[(triton.cdiv(num_queries, blocks.rows), num_heads)](
        *inputs.attention_arguments(),
        *inputs.range_arguments(),
        spans_B4,
        lse_TH,
        num_queries,
        num_keys,
        scale * math.log2(math.e),
        **{name: constants[name] for name in ("HEADS", "CHANNELS", "PADDED_CHANNELS")},
        **launch_constants(blocks),
    )
    return lse_TH


@triton.jit
def _online_softmax_update_range(
    m_i: tl.tensor,
    l_i: tl.tensor,
    query_tile: tl.tensor,
    key_group: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    key_reach: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    num_keys: int,
    key_stride_s: int,
    scale_log2: float,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
) -> tl.tensor:
    """Return m_i and l_i of `online_softmax_update` after the keys from `first` to `last`."""
    place = tl.arange(0, BLOCK_S)
    for begin in range(first, last, BLOCK_S):
        is_key = place < num_keys - begin
        key_tile = load_block(key_group, key_stride_s, begin, is_key, CHANNELS, PADDED_CHANNELS)
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee") * scale_log2
        if not ALL_VISIBLE:
            is_visible = mask_block(start, end, key_reach, begin, 0, is_key)
            logits = tl.where(is_visible, logits, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(logits - m_new[:, None]), 1)
        m_i = m_new
    return m_i, l_i


@triton.jit
def _lse_kernel(
    query_heads: tl.tensor,
    key_heads: tl.tensor,
    query_stride_t: int,
    query_stride_h: int,
    key_stride_s: int,
    key_stride_g: int,
    key_start: tl.tensor,
    key_end: tl.tensor,
    key_reach: tl.tensor,
    spans: tl.tensor,
    lse: tl.tensor,
    num_queries: int,
    num_keys: int,
    scale_log2: float,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    scale_log2 = tl.cast(scale_log2, tl.float32)  # torch.compile gives float64
    # The last rows of a causal sequence are the longest; started first, they leave no tail.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    query, local, is_query = locate_block(block, 0, num_queries, BLOCK_T)
    head = tl.program_id(1)
    head_queries = query_heads + head * query_stride_h
    query_tile = load_block(
        head_queries, query_stride_t, query, is_query, CHANNELS, PADDED_CHANNELS
    )
    key_group = key_heads + head // HEADS * key_stride_g
    start, end = load_ranges(key_start, key_end, query, 0, is_query)
    span = spans + query // TILE * 4
    first = tl.load(span) // BLOCK_S * BLOCK_S
    last = tl.cdiv(tl.load(span + 1), BLOCK_S) * BLOCK_S
    # Between these two every query sees every key.
    inner = tl.minimum(tl.maximum(tl.cdiv(tl.load(span + 2), BLOCK_S) * BLOCK_S, first), last)
    outer = tl.maximum(tl.load(span + 3) // BLOCK_S * BLOCK_S, inner)
    # Finite, so that a row without any key never computes inf - inf.
    m_i = tl.full([BLOCK_T], -1.0e38, tl.float32)
    l_i = tl.zeros([BLOCK_T], tl.float32)
    for part in tl.static_range(3):
        begin = first if part == 0 else (inner if part == 1 else outer)
        stop = inner if part == 0 else (outer if part == 1 else last)
        m_i, l_i = _online_softmax_update_range(
            m_i,
            l_i,
            query_tile,
            key_group,
            start,
            end,
            key_reach,
            begin,
            stop,
            num_keys,
            key_stride_s,
            scale_log2,
            CHANNELS,
            PADDED_CHANNELS,
            BLOCK_S,
            ALL_VISIBLE=part == 1,
        )
    row_lse = tl.where(l_i > 0, m_i + tl.log2(l_i), float("inf"))
    num_heads = tl.num_programs(1)
    tl.store(lse + query * num_heads + head + local * num_heads, row_lse, is_query)
