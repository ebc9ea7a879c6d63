"""The warm-up's loss in Triton, forward: the value, tile by tile.

A program takes one tile of queries and keys, adds up the heads' weights and the indexer's scores
in registers, and leaves a few numbers for each of its queries. Queries are streamed, a group's
keys stay: its heads share them. Rows come in chunks whose queries stay in the L2 cache.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, B tiles of queries, N blocks of keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.indexer_loss.triton_dense_tiles import (
    DenseInputs,
    is_spanned,
    launch_constants,
    load_ranges,
    query_chunks,
    sum_weights,
)
from megatron_keye.kernels.launch import Blocks
from megatron_keye.kernels.primitives import fast_log2, load_rows, score_tile

VALUE_BLOCKS = Blocks(rows=64, keys=128, warps=4, stages=3)
LN_2 = tl.constexpr(math.log(2))


def dense_divergence(
    inputs: DenseInputs, spans_B4: Tensor, lse_TH: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return kl_TG, and float32 log-sum-exp of the indexer's scores [T], +inf without any key.

    Args:
        inputs: From `checked`.
        spans_B4: From `span_tiles`.
        lse_TH: From `attention_lse`, or the same numbers known before; contiguous.
        scale: Factor of the attention's logits.
    """
    blocks = inputs.blocks(VALUE_BLOCKS)
    num_queries, num_keys = inputs.sizes()
    num_groups = inputs.key_SGC.shape[1]
    num_blocks = triton.cdiv(num_keys, blocks.keys)
    kl_TG = lse_TH.new_empty((num_queries, num_groups))
    score_lse_T = lse_TH.new_empty(num_queries)
    for first, last in query_chunks(num_queries, num_keys):
        terms_NTG = lse_TH.new_empty((num_blocks, last - first, num_groups))
        lse_NT = lse_TH.new_empty((num_blocks, last - first))
        _value_kernel[(triton.cdiv(last - first, blocks.rows), num_blocks)](
            *inputs.score_arguments(),
            *inputs.attention_arguments(),
            inputs.key_start_T,
            inputs.key_end_T,
            spans_B4,
            lse_TH,
            terms_NTG,
            lse_NT,
            first,
            last,
            num_keys,
            scale * math.log2(math.e),
            inputs.q_TIJ.shape[2] ** -0.5 * math.log2(math.e),
            **inputs.constants(),
            **launch_constants(blocks),
        )
        lse_T = torch.logsumexp(lse_NT, dim=0)
        has_keys_T = lse_T > -torch.inf
        kl_TG[first:last] = terms_NTG.sum(0) + lse_T.where(has_keys_T, 0)[:, None]
        score_lse_T[first:last] = lse_T.where(has_keys_T, torch.inf)
    return kl_TG, score_lse_T


@triton.jit
def _value_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gate: tl.tensor,
    q_stride_t: int,
    q_stride_i: int,
    k_stride_s: int,
    gate_stride_t: int,
    gate_stride_i: int,
    query_heads: tl.tensor,
    key_heads: tl.tensor,
    query_stride_t: int,
    query_stride_h: int,
    key_stride_s: int,
    key_stride_g: int,
    key_start: tl.tensor,
    key_end: tl.tensor,
    spans: tl.tensor,
    lse: tl.tensor,
    terms: tl.tensor,
    score_lse: tl.tensor,
    first: int,
    last: int,
    num_keys: int,
    scale_log2: float,
    score_scale_log2: float,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    INDEXER_HEADS: tl.constexpr,
    INDEXER_CHANNELS: tl.constexpr,
    PADDED_INDEXER_CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    query = first + tl.program_id(0).to(tl.int64) * BLOCK_T
    key = tl.program_id(1).to(tl.int64) * BLOCK_S
    local, place = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    is_query, is_key = local < last - query, place < num_keys - key
    row = tl.program_id(1).to(tl.int64) * (last - first) + query - first + local
    if is_spanned(spans, query, key, TILE, BLOCK_S):
        k_tile = load_rows(
            k + key * k_stride_s,
            place * k_stride_s,
            is_key,
            INDEXER_CHANNELS,
            PADDED_INDEXER_CHANNELS,
        )
        scores = score_scale_log2 * score_tile(
            q + query * q_stride_t,
            gate + query * gate_stride_t,
            k_tile,
            local,
            is_query,
            q_stride_t,
            q_stride_i,
            gate_stride_t,
            gate_stride_i,
            INDEXER_HEADS,
            INDEXER_CHANNELS,
            PADDED_INDEXER_CHANNELS,
        )
        start, end = load_ranges(key_start + query, key_end + query, local, is_query, key)
        is_visible = (place[None, :] >= start[:, None]) & (place[None, :] < end[:, None])
        visible = tl.where(is_visible, scores, -float("inf"))
        top = tl.max(visible, 1)
        top = tl.where(top > -float("inf"), top, 0.0)
        total = tl.sum(tl.exp2(visible - top[:, None]), 1)
        tl.store(score_lse + row, (top + tl.log2(total)) * LN_2, is_query)
        share = tl.full([BLOCK_T], 1.0 / HEADS, tl.float32)
        for group in range(GROUPS):
            key_tile = load_rows(
                key_heads + key * key_stride_s + group * key_stride_g,
                place * key_stride_s,
                is_key,
                CHANNELS,
                PADDED_CHANNELS,
            )
            target = sum_weights(
                query_heads + query * query_stride_t + group * HEADS * query_stride_h,
                lse + (query * GROUPS + group) * HEADS,
                key_tile,
                local,
                is_query,
                tl.zeros([BLOCK_T, BLOCK_S], tl.float32),
                share,
                query_stride_t,
                query_stride_h,
                scale_log2,
                HEADS,
                GROUPS * HEADS,
                CHANNELS,
                PADDED_CHANNELS,
            )
            target = tl.where(is_visible, target, 0.0)
            # 0 log 0 is 0; no target that counts lies below the smallest normal number.
            divergence = target * (fast_log2(tl.maximum(target, 1.2e-38)) - scores)
            tl.store(terms + row * GROUPS + group, tl.sum(divergence, 1) * LN_2, is_query)
    else:
        nothing = tl.zeros([BLOCK_T], tl.float32)
        tl.store(score_lse + row, nothing - float("inf"), is_query)
        for group in range(GROUPS):
            tl.store(terms + row * GROUPS + group, nothing, is_query)
