# SPDX-License-Identifier: Apache-2.0
"""Log-sum-exp of the indexer's scores over each query's range, a chunk at a time, in Triton.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, B tiles of queries,
N blocks of keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.dense_indexer_loss.triton.ranges import is_spanned, load_mask
from megatron_keye.kernels.dense_indexer_loss.triton.tiles import (
    LN_2,
    DenseInputs,
    launch_constants,
    locate_block,
    score_block,
)
from megatron_keye.kernels.launch import Blocks

SCORE_BLOCKS = Blocks(rows=64, keys=128, warps=4, stages=3)


def score_lse(inputs: DenseInputs, spans_B4: Tensor, first: int, last: int) -> Tensor:
    """Return the natural log-sum-exp of queries `first` to `last`, float32; +inf without keys.

    Args:
        inputs: From `checked`.
        spans_B4: From `span_tiles`.
        first: First query, the first of a tile.
        last: One past the last query.
    """
    blocks = inputs.blocks(SCORE_BLOCKS)
    num_keys = inputs.sizes()[1]
    num_blocks = triton.cdiv(num_keys, blocks.keys)
    lse_NT = spans_B4.new_empty((num_blocks, last - first), dtype=torch.float32)
    _score_lse_kernel[(triton.cdiv(last - first, blocks.rows), num_blocks)](
        *inputs.score_arguments(),
        *inputs.range_arguments(),
        spans_B4,
        lse_NT,
        first,
        last,
        num_keys,
        inputs.q_TIJ.shape[2] ** -0.5 * math.log2(math.e),
        **inputs.indexer_constants(),
        **launch_constants(blocks),
    )
    lse_T = torch.logsumexp(lse_NT, dim=0)
    return lse_T.masked_fill_(lse_T.isneginf(), torch.inf)


@triton.jit
def _score_lse_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gate: tl.tensor,
    q_stride_t: int,
    q_stride_i: int,
    k_stride_s: int,
    gate_stride_t: int,
    gate_stride_i: int,
    key_start: tl.tensor,
    key_end: tl.tensor,
    key_reach: tl.tensor,
    spans: tl.tensor,
    lse: tl.tensor,
    first: int,
    last: int,
    num_keys: int,
    score_scale_log2: float,
    INDEXER_HEADS: tl.constexpr,
    INDEXER_CHANNELS: tl.constexpr,
    PADDED_INDEXER_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    indexer = q, k, gate, q_stride_t, q_stride_i, k_stride_s, gate_stride_t, gate_stride_i
    query, local, is_query = locate_block(tl.program_id(0), first, last, BLOCK_T)
    key, _, is_key = locate_block(tl.program_id(1), 0, num_keys, BLOCK_S)
    row = tl.program_id(1).to(tl.int64) * (last - first) + query - first + local
    if is_spanned(spans, query, key, TILE, BLOCK_S):
        scores = score_block(
            indexer,
            query,
            key,
            is_query,
            is_key,
            score_scale_log2,
            INDEXER_HEADS,
            INDEXER_CHANNELS,
            PADDED_INDEXER_CHANNELS,
        )
        is_visible = load_mask(key_start, key_end, key_reach, query, key, is_query, is_key)
        scores = tl.where(is_visible, scores, -float("inf"))
        m_i = tl.max(scores, 1)
        m_i = tl.where(m_i > -float("inf"), m_i, 0.0)
        l_i = tl.sum(tl.exp2(scores - m_i[:, None]), 1)
        tl.store(lse + row, (m_i + tl.log2(l_i)) * LN_2, is_query)
    else:
        tl.store(lse + row, tl.full([BLOCK_T], -float("inf"), tl.float32), is_query)
