# SPDX-License-Identifier: Apache-2.0
"""The exact top-k of a few long rows, where one program per row would leave most of a GPU idle.

With the extension each row is split over a cluster of thread blocks. Elsewhere, and for more or
longer rows, programs select from parts of each row, then from what the parts selected: the best
of a row are among the best of its parts, and parts keep their order, so ties still go to the
lower key.

Shape letters: T rows, S keys, K selected keys, X parts of a row, Y keys selected from a part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_keye.kernels.select_top_k import cuda, fastest_impl, select_top_k

MAX_PROGRAMS = 128
"""Rows and parts that select at once; an H100 has 132 multiprocessors."""


def can_split_rows(scores_TS: Tensor) -> bool:
    """Return whether the CUDA form selects from these rows, each split over a cluster."""
    return cuda.splits_rows(scores_TS) and fastest_impl(scores_TS) == "cuda"


def choose_parts(num_rows: int, num_keys: int, k: int) -> int:
    """Return into how many parts of equal size a row is cut, a power of two.

    Args:
        num_rows: T.
        num_keys: S.
        k: K; more parts leave more candidates, so that at some point nothing is gained.
    """
    parts = 1
    while (
        num_keys % (2 * parts) == 0
        and 2 * parts * num_rows <= MAX_PROGRAMS
        and num_keys > 2 * k * parts * parts
    ):
        parts *= 2
    return parts


def select_from_parts(scores_TS: Tensor, end_T: Tensor, end_TX: Tensor, k: int) -> Tensor:
    """Return indices_TK as `select_top_k` would for ranges from 0 to `end_T`.

    Args:
        scores_TS: float32, contiguous.
        end_T: int64, one past the last key of each row.
        end_TX: int64, the same counted from the beginning of each part, within it.
        k: K.
    """
    if can_split_rows(scores_TS):
        return cuda.select_top_k_split_rows(scores_TS, end_T, k)
    impl = fastest_impl(scores_TS)
    (num_rows, num_parts), num_keys = end_TX.shape, scores_TS.shape[1]
    zero_T = torch.zeros_like(end_TX).flatten()
    if num_parts == 1:
        return select_top_k(scores_TS, zero_T, end_T, k, impl=impl)
    part_size = num_keys // num_parts
    num_best = min(k, part_size)
    best_TXY = select_top_k(
        scores_TS.view(-1, part_size), zero_T, end_TX.flatten(), num_best, impl=impl
    )
    candidates_TY = scores_TS.new_empty((num_rows, num_parts * num_best))
    all_T = torch.empty_like(end_T)
    block = int(triton.next_power_of_2(num_best))
    _gather_kernel[(num_rows, num_parts)](
        scores_TS, best_TXY, candidates_TY, all_T, part_size, num_best, BLOCK=block
    )
    chosen_TK = select_top_k(candidates_TY, zero_T[:num_rows], all_T, k, impl=impl)
    indices_TK = torch.empty_like(chosen_TK)
    _translate_kernel[(num_rows, triton.cdiv(k, 1024))](
        chosen_TK, best_TXY, end_T, indices_TK, part_size, num_best, num_parts, k, BLOCK=1024
    )
    return indices_TK


@triton.jit
def _gather_kernel(
    scores: tl.tensor,
    best: tl.tensor,
    candidates: tl.tensor,
    ends: tl.tensor,
    part_size: int,
    num_best: int,
    BLOCK: tl.constexpr,
) -> None:
    row, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    part += (row * num_parts).to(tl.int64)
    place = tl.arange(0, BLOCK)
    key = tl.load(best + part * num_best + place, place < num_best, other=-1)
    # NaN ranks below every score, so padding is chosen only where nothing else is left.
    score = tl.load(scores + part * part_size + key, key >= 0, other=float("nan"))
    tl.store(candidates + part * num_best + place, score, place < num_best)
    if tl.program_id(1) == 0:
        tl.store(ends + row, (num_parts * num_best).to(tl.int64))


@triton.jit
def _translate_kernel(
    chosen: tl.tensor,
    best: tl.tensor,
    ends: tl.tensor,
    indices: tl.tensor,
    part_size: int,
    num_best: int,
    num_parts: int,
    k: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ends + row)
    candidate = tl.load(chosen + row * k + place, place < k, other=-1)
    best_row = best + row * (num_parts * num_best)
    local = tl.load(best_row + candidate, candidate >= 0, other=-1)
    key = candidate // num_best * part_size + local
    # A row of at most k keys takes them all, and the parts' padding lies in between.
    key = tl.where(end > k, key, tl.where(place < end, place, -1))
    tl.store(indices + row * k + place, key, place < k)
