"""The gradient of the indexer's scores in the warm-up, a chunk of rows at a time, in Triton.

The one matrix of queries by keys that the backward writes down: recomputing it for each sum over
it would cost twice the work of the target again.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, B tiles of queries.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.indexer_loss.triton_dense_tiles import (
    DenseInputs,
    is_spanned,
    launch_constants,
    load_ranges,
    sum_weights,
)
from megatron_keye.kernels.launch import Blocks
from megatron_keye.kernels.primitives import load_rows, score_tile

LOG2_E = tl.constexpr(math.log2(math.e))
SCORE_BLOCKS = Blocks(rows=64, keys=128, warps=4, stages=3)
"""Its keys are at least those of the blocks that read what it wrote."""


def write_score_gradient(
    dscores_TS: Tensor,
    dkl_TG: Tensor,
    inputs: DenseInputs,
    spans_B4: Tensor,
    lse_TH: Tensor,
    score_lse_T: Tensor,
    first: int,
    *,
    scale: float,
) -> None:
    """Write sum over groups of dkl * (softmax - target) where a tile's span reaches."""
    blocks = inputs.blocks(SCORE_BLOCKS)
    num_rows, (_, num_keys) = len(dscores_TS), inputs.sizes()
    _score_gradient_kernel[
        (triton.cdiv(num_rows, blocks.rows), triton.cdiv(num_keys, blocks.keys))
    ](
        *inputs.score_arguments(),
        *inputs.attention_arguments(),
        inputs.key_start_T,
        inputs.key_end_T,
        spans_B4,
        lse_TH,
        score_lse_T,
        dkl_TG,
        dscores_TS,
        first,
        first + num_rows,
        num_keys,
        dscores_TS.stride(0),
        scale * math.log2(math.e),
        inputs.q_TIJ.shape[2] ** -0.5 * math.log2(math.e),
        **inputs.constants(),
        **launch_constants(blocks),
    )


@triton.jit
def _score_gradient_kernel(
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
    score_lse: tl.tensor,
    dkl: tl.tensor,
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
) -> None:
    query = first + tl.program_id(0).to(tl.int64) * BLOCK_T
    key = tl.program_id(1).to(tl.int64) * BLOCK_S
    local, place = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    is_query, is_key = local < last - query, place < num_keys - key
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
        dkl_rows = dkl + query * GROUPS
        factor = tl.zeros([BLOCK_T], tl.float32)
        for group in tl.static_range(GROUPS):
            factor += tl.load(dkl_rows + group + local * GROUPS, is_query, other=0.0)
        row_lse = tl.load(score_lse + query + local, is_query, other=float("inf")) * LOG2_E
        dscore = factor[:, None] * tl.exp2(scores - row_lse[:, None])
        for group in range(GROUPS):
            key_tile = load_rows(
                key_heads + key * key_stride_s + group * key_stride_g,
                place * key_stride_s,
                is_key,
                CHANNELS,
                PADDED_CHANNELS,
            )
            factor = tl.load(dkl_rows + group + local * GROUPS, is_query, other=0.0)
            dscore = sum_weights(
                query_heads + query * query_stride_t + group * HEADS * query_stride_h,
                lse + (query * GROUPS + group) * HEADS,
                key_tile,
                local,
                is_query,
                dscore,
                factor / -HEADS,
                query_stride_t,
                query_stride_h,
                scale_log2,
                HEADS,
                GROUPS * HEADS,
                CHANNELS,
                PADDED_CHANNELS,
            )
        start, end = load_ranges(key_start + query, key_end + query, local, is_query, key)
        is_visible = (place[None, :] >= start[:, None]) & (place[None, :] < end[:, None])
        # Only now: whatever lies outside the ranges, inf and NaN too, is dropped at once.
        dscore = tl.where(is_visible, dscore, 0.0).to(dscores.dtype.element_ty)
        corner = dscores + (query - first) * dscores_stride_t + key
        places = corner + local[:, None] * dscores_stride_t + place[None, :]
        tl.store(places, dscore, is_query[:, None])
