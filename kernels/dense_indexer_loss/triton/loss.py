# SPDX-License-Identifier: Apache-2.0
"""The warm-up's loss in Triton: the value and the gradient of the scores, tile by tile.

A program takes one tile of queries and keys, adds up the heads' weights and the indexer's scores
in registers, writes one number per query and group and, where something learns, the tile's
gradient. Queries are streamed; a group's keys are loaded once, since its heads share them. Rows
come in chunks whose queries stay in the L2 cache.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, B tiles of queries, N blocks of keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.dense_indexer_loss.triton.gradients import Gradients
from megatron_keye.kernels.dense_indexer_loss.triton.ranges import is_spanned, load_mask
from megatron_keye.kernels.dense_indexer_loss.triton.score_lse import score_lse
from megatron_keye.kernels.dense_indexer_loss.triton.tiles import (
    LN_2,
    LOG2_E,
    WIDEST_BLOCK,
    DenseInputs,
    launch_constants,
    locate_block,
    mean_weights,
    query_chunks,
    score_block,
)
from megatron_keye.kernels.launch import Blocks
from megatron_keye.kernels.primitives import fast_log2

LOSS_BLOCKS = Blocks(rows=64, keys=128, warps=4, stages=3)
"""Its keys are at least those of the blocks that read the gradient which it wrote."""


def dense_divergence(
    inputs: DenseInputs,
    weight_T: Tensor,
    spans_B4: Tensor,
    lse_TH: Tensor,
    *,
    scale: float,
    with_gradients: bool,
) -> tuple[Tensor, Gradients | None]:
    """Return kl_TG and the gradients of its weighted sum.

    The gradient of the scores is the one matrix of queries by keys that is written down, a chunk
    of rows at a time: recomputing it for each sum over it would cost twice the target's work.

    Args:
        inputs: From `checked`.
        weight_T: float32, what each query's loss weighs in the sum; contiguous.
        spans_B4: From `span_tiles`.
        lse_TH: From `attention_lse`, or the same numbers known before; contiguous.
        scale: Factor of the attention's logits.
        with_gradients: Whether gradients are wanted.
    """
    num_queries, num_keys = inputs.sizes()
    num_groups = inputs.key_SGC.shape[1]
    kl_TG = lse_TH.new_empty((num_queries, num_groups))
    gradients = Gradients(inputs) if with_gradients else None
    width = triton.cdiv(num_keys, WIDEST_BLOCK) * WIDEST_BLOCK
    # Not float16: a probability among 128K keys is too small for it.
    is_wide = inputs.q_TIJ.dtype == torch.float32
    dtype = torch.float32 if is_wide else torch.bfloat16
    for first, last in query_chunks(num_queries, num_keys):
        dscores_TS = lse_TH.new_empty((last - first if gradients else 0, width), dtype=dtype)
        kl_TG[first:last] = _chunk_divergence(
            inputs, weight_T, spans_B4, lse_TH, dscores_TS, first, last, scale=scale
        )
        if gradients is not None:
            gradients.add(dscores_TS, inputs, spans_B4, first)
    return kl_TG, gradients


def _chunk_divergence(
    inputs: DenseInputs,
    weight_T: Tensor,
    spans_B4: Tensor,
    lse_TH: Tensor,
    dscores_TS: Tensor,
    first: int,
    last: int,
    *,
    scale: float,
) -> Tensor:
    """Return kl_TG of one chunk; write where a tile's span reaches, if `dscores_TS` has rows."""
    blocks = inputs.blocks(LOSS_BLOCKS)
    num_blocks = triton.cdiv(inputs.sizes()[1], blocks.keys)
    terms_NTG = lse_TH.new_empty((num_blocks, last - first, inputs.key_SGC.shape[1]))
    _loss_kernel[(triton.cdiv(last - first, blocks.rows), num_blocks)](
        *inputs.score_arguments(),
        *inputs.attention_arguments(),
        *inputs.range_arguments(),
        spans_B4,
        lse_TH,
        score_lse(inputs, spans_B4, first, last),
        weight_T,
        terms_NTG,
        dscores_TS,
        first,
        last,
        inputs.sizes()[1],
        dscores_TS.stride(0),
        scale * math.log2(math.e),
        inputs.q_TIJ.shape[2] ** -0.5 * math.log2(math.e),
        **inputs.constants(),
        **launch_constants(blocks),
        WITH_GRADIENT=len(dscores_TS) > 0,
    )
    return terms_NTG.sum(0)


@triton.jit
def _loss_kernel(
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
    key_reach: tl.tensor,
    spans: tl.tensor,
    lse: tl.tensor,
    score_lse: tl.tensor,
    weight: tl.tensor,
    terms: tl.tensor,
    dscores: tl.tensor,
    first: int,
    last: int,
    num_keys: int,
    dscores_stride_t: int,
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
    WITH_GRADIENT: tl.constexpr,
) -> None:
    indexer = q, k, gate, q_stride_t, q_stride_i, k_stride_s, gate_stride_t, gate_stride_i
    attention = query_heads, key_heads, query_stride_t, query_stride_h, key_stride_s, key_stride_g
    query, local, is_query = locate_block(tl.program_id(0), first, last, BLOCK_T)
    key, place, is_key = locate_block(tl.program_id(1), 0, num_keys, BLOCK_S)
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
        row_lse = tl.load(score_lse + (query - first) + local, is_query, other=float("inf"))
        scores -= row_lse[:, None] * LOG2_E
        is_visible = load_mask(key_start, key_end, key_reach, query, key, is_query, is_key)
        target_sum = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        for group in range(GROUPS):
            target = mean_weights(
                attention,
                lse,
                query,
                key,
                group,
                is_query,
                is_key,
                scale_log2,
                GROUPS,
                HEADS,
                CHANNELS,
                PADDED_CHANNELS,
            )
            if WITH_GRADIENT:
                target_sum += target
            # 0 log 0 is 0; no target that counts lies below the smallest normal number.
            divergence = target * (fast_log2(tl.maximum(target, 1.2e-38)) - scores)
            # Only now: whatever lies outside the ranges, inf and NaN too, is dropped at once.
            divergence = tl.where(is_visible, divergence, 0.0)
            tl.store(terms + row * GROUPS + group, tl.sum(divergence, 1) * LN_2, is_query)
        if WITH_GRADIENT:
            factor = tl.load(weight + query + local, is_query, other=0.0)
            dscore = factor[:, None] * (GROUPS * tl.exp2(scores) - target_sum)
            dscore = tl.where(is_visible, dscore, 0.0).to(dscores.dtype.element_ty)
            corner = dscores + (query - first) * dscores_stride_t + key
            places = corner + local[:, None] * dscores_stride_t + place[None, :]
            tl.store(places, dscore, is_query[:, None])
    else:
        for group in range(GROUPS):
            tl.store(terms + row * GROUPS + group, tl.zeros([BLOCK_T], tl.float32), is_query)
