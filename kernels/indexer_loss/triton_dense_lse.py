"""Log-sum-exp of the attention's logits in Triton: attention without values.

The mean over heads of their softmax needs every head's own sum first; this pass finds them.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head,
B tiles of queries.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.indexer_loss.triton_dense_tiles import (
    DenseInputs,
    launch_constants,
    load_ranges,
)
from megatron_keye.kernels.launch import Blocks
from megatron_keye.kernels.primitives import load_rows

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
        inputs.key_start_T,
        inputs.key_end_T,
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
def _fold_keys(
    top: tl.tensor,
    total: tl.tensor,
    query_tile: tl.tensor,
    key_group: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
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
    """Return the largest logit so far and the sum of exponentials below it, for more keys."""
    place = tl.arange(0, BLOCK_S)
    for begin in range(first, last, BLOCK_S):
        key_tile = load_rows(
            key_group + tl.cast(begin, tl.int64) * key_stride_s,
            place * key_stride_s,
            place < num_keys - begin,
            CHANNELS,
            PADDED_CHANNELS,
        )
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee") * scale_log2
        if not ALL_VISIBLE:
            key = (begin + place)[None, :]
            logits = tl.where(
                (key >= start[:, None]) & (key < end[:, None]), logits, -float("inf")
            )
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
    return top, total


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
    block = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    query = block * BLOCK_T
    local = tl.arange(0, BLOCK_T)
    is_query = local < num_queries - query
    query_tile = load_rows(
        query_heads + head * query_stride_h + query * query_stride_t,
        local * query_stride_t,
        is_query,
        CHANNELS,
        PADDED_CHANNELS,
    )
    key_group = key_heads + head // HEADS * key_stride_g
    start, end = load_ranges(key_start + query, key_end + query, local, is_query, 0)
    span = spans + query // TILE * 4
    first = tl.load(span) // BLOCK_S * BLOCK_S
    last = tl.cdiv(tl.load(span + 1), BLOCK_S) * BLOCK_S
    # Between these two every query sees every key.
    inner = tl.minimum(tl.maximum(tl.cdiv(tl.load(span + 2), BLOCK_S) * BLOCK_S, first), last)
    outer = tl.maximum(tl.load(span + 3) // BLOCK_S * BLOCK_S, inner)
    # Finite, so that a row without any key meets no inf - inf.
    top = tl.full([BLOCK_T], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for part in tl.static_range(3):
        begin = first if part == 0 else (inner if part == 1 else outer)
        stop = inner if part == 0 else (outer if part == 1 else last)
        top, total = _fold_keys(
            top,
            total,
            query_tile,
            key_group,
            start,
            end,
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
    row_lse = tl.where(total > 0, top + tl.log2(total), float("inf"))
    num_heads = tl.num_programs(1)
    tl.store(lse + query * num_heads + head + local * num_heads, row_lse, is_query)
