# SPDX-License-Identifier: Apache-2.0
"""Exact top-k selection in Triton: a program finds its row's k-th score digit by digit.

Scores become integers of the same order; counting them by their highest bits, then the next,
gives the threshold, and one ordered pass writes what lies above it. Only counts decide, so
that nothing depends on the order in which threads arrive. Works without the extension; the
CUDA form reads the row fewer times.

Shape letters: T queries, S keys, K selected keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.launch import check_triton

_BLOCK_S = 4096


def select_top_k(scores_TS: Tensor, key_start_T: Tensor, key_end_T: Tensor, k: int) -> Tensor:
    """Return indices_TK; see api.select_top_k. NaN ranks below -inf."""
    check_triton("select_top_k", scores_TS, scores_TS=scores_TS)
    num_queries, num_keys = scores_TS.shape
    indices_TK = torch.empty((num_queries, k), dtype=torch.int32, device=scores_TS.device)
    if num_queries > 0:
        _select_kernel[(num_queries,)](
            scores_TS,
            key_start_T,
            key_end_T,
            indices_TK,
            num_queries,
            num_keys,
            k,
            *scores_TS.stride(),
            BLOCK_S=min(_BLOCK_S, max(16, int(triton.next_power_of_2(num_keys)))),
            num_warps=8,
        )
    return indices_TK


@triton.jit
def _ordered(score: tl.tensor) -> tl.tensor:
    """Return uint32 in the order of the scores: -0.0 equals 0.0, NaN is less than -inf."""
    score = score.to(tl.float32)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    ordered = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(score != score, 0, ordered).to(tl.uint32)


@triton.jit
def _narrow(
    row: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    stride_s: tl.tensor,
    prefix: tl.tensor,
    wanted: tl.tensor,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> tl.tensor:
    """Return prefix with the next digit of the wanted-th largest, and how many ties it may take.

    Of the scores that agree with `prefix` above bit SHIFT + BITS, `wanted` are taken.
    """
    counts = tl.zeros([1 << BITS], tl.int32)
    for first in range(start, end, BLOCK_S):
        key = first + tl.arange(0, BLOCK_S)
        is_inside = key < end
        ordered = _ordered(tl.load(row + key * stride_s, is_inside, other=0.0))
        if SHIFT + BITS < 32:
            is_inside = is_inside & (ordered >> (SHIFT + BITS) == prefix >> (SHIFT + BITS))
        digit = ((ordered >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        counts += tl.histogram(digit, 1 << BITS, mask=is_inside)
    at_or_above = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_or_above >= wanted).to(tl.int32)) - 1
    above = tl.sum(tl.where(tl.arange(0, 1 << BITS) > digit, counts, 0))
    return prefix | (digit.to(tl.uint32) << SHIFT), wanted - above


@triton.jit
def _select_kernel(
    scores: tl.tensor,
    key_start: tl.tensor,
    key_end: tl.tensor,
    indices: tl.tensor,
    num_queries: int,
    num_keys: int,
    k: int,
    stride_t: int,
    stride_s: int,
    BLOCK_S: tl.constexpr,
) -> None:
    # The last rows of a causal sequence are the longest; started first, they leave no tail.
    query = (num_queries - 1 - tl.program_id(0)).to(tl.int64)
    start = tl.maximum(tl.load(key_start + query), 0)
    end = tl.minimum(tl.load(key_end + query), num_keys)
    row = scores + query * stride_t
    taken = indices + query * k
    num_candidates = tl.maximum(end - start, 0)
    threshold = tl.zeros([], tl.uint32)
    # A row of at most k candidates takes all: everything is at or above 0.
    num_ties = num_candidates.to(tl.int32)
    if num_candidates > k:
        num_ties = k + tl.zeros([], tl.int32)
        threshold, num_ties = _narrow(
            row, start, end, stride_s, threshold, num_ties, 21, 11, BLOCK_S
        )
        threshold, num_ties = _narrow(
            row, start, end, stride_s, threshold, num_ties, 10, 11, BLOCK_S
        )
        threshold, num_ties = _narrow(
            row, start, end, stride_s, threshold, num_ties, 0, 10, BLOCK_S
        )
    num_above = tl.zeros([], tl.int32)
    num_equal = tl.zeros([], tl.int32)
    for first in range(start, end, BLOCK_S):
        key = first + tl.arange(0, BLOCK_S)
        is_inside = key < end
        ordered = _ordered(tl.load(row + key * stride_s, is_inside, other=0.0))
        is_above = is_inside & (ordered > threshold)
        is_equal = is_inside & (ordered == threshold)
        above = num_above + tl.cumsum(is_above.to(tl.int32)) - is_above.to(tl.int32)
        equal = num_equal + tl.cumsum(is_equal.to(tl.int32)) - is_equal.to(tl.int32)
        is_taken = is_above | (is_equal & (equal < num_ties))
        place = above + tl.minimum(equal, num_ties)
        tl.store(taken + place, key.to(tl.int32), is_taken)
        num_above += tl.sum(is_above.to(tl.int32))
        num_equal += tl.sum(is_equal.to(tl.int32))
    num_taken = num_above + tl.minimum(num_equal, num_ties)
    for first in range(0, k, BLOCK_S):
        place = first + tl.arange(0, BLOCK_S)
        tl.store(taken + place, -1, (place >= num_taken) & (place < k))
