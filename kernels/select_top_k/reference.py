# SPDX-License-Identifier: Apache-2.0
"""Eager form of the exact top-k selection.

It defines the operator: other implementations must return the same integers.

Shape letters: T queries, S keys, K selected keys.
"""

import functools

import torch
from torch import Tensor

from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.visible_keys import find_visible

_BYTES_PER_SCORE = 32
"""Masks, ranks and a copy of the scores, for one score."""


@torch.no_grad()
def select_top_k(scores_TS: Tensor, key_start_T: Tensor, key_end_T: Tensor, k: int) -> Tensor:
    """Return indices_TK; see api.select_top_k."""
    (indices_TK,) = map_row_chunks(
        functools.partial(_select_rows, k=k),
        (scores_TS, key_start_T, key_end_T),
        (),
        bytes_per_row=_BYTES_PER_SCORE * scores_TS.shape[1],
    )
    return indices_TK


def _select_rows(
    scores_TS: Tensor, key_start_T: Tensor, key_end_T: Tensor, *, k: int
) -> tuple[Tensor]:
    """Return indices_TK of one chunk of rows."""
    is_candidate_TS = find_visible(key_start_T, key_end_T, scores_TS.shape[1])
    return (select_candidates(scores_TS, is_candidate_TS, k),)


def select_candidates(scores_TS: Tensor, is_candidate_TS: Tensor, k: int) -> Tensor:
    """Return indices_TK, the k best of each row's candidates.

    Args:
        scores_TS: Any float type.
        is_candidate_TS: bool.
        k: Keys K to select.
    """
    is_number_TS = is_candidate_TS & ~scores_TS.isnan()
    numbers_TS = scores_TS.masked_fill(~is_number_TS, -torch.inf)
    is_selected_TS = _mark_best(numbers_TS, is_number_TS, k)
    # NaN ranks below -inf.
    is_nan_TS = is_candidate_TS & ~is_number_TS
    num_free_T1 = k - is_selected_TS.sum(dim=1, keepdim=True)
    is_selected_TS |= is_nan_TS & (is_nan_TS.cumsum(dim=1) <= num_free_T1)
    return _list_marked(is_selected_TS, k)


def _mark_best(candidates_TS: Tensor, is_candidate_TS: Tensor, k: int) -> Tensor:
    """Return bool [T, S]: candidates above the k-th value, or equal to it and early enough.

    Works on the value of the k-th score, which torch.topk gives exactly, since the order that it
    gives equal scores is not defined.
    """
    num_ranked = min(k, candidates_TS.shape[1])
    if num_ranked == 0:
        return is_candidate_TS
    threshold_T1 = candidates_TS.topk(num_ranked, dim=1).values[:, -1:]
    is_above_TS = candidates_TS > threshold_T1
    is_tied_TS = (candidates_TS == threshold_T1) & is_candidate_TS
    num_free_T1 = k - is_above_TS.sum(dim=1, keepdim=True)
    return is_above_TS | (is_tied_TS & (is_tied_TS.cumsum(dim=1) <= num_free_T1))


def _list_marked(is_marked_TS: Tensor, k: int) -> Tensor:
    """Return the marked columns of each row as int32 [T, K], ascending, padded with -1."""
    num_rows = is_marked_TS.shape[0]
    indices_TK = torch.full((num_rows, k), -1, dtype=torch.int32, device=is_marked_TS.device)
    rows, columns = is_marked_TS.nonzero(as_tuple=True)
    slots = is_marked_TS.cumsum(dim=1)[rows, columns] - 1
    indices_TK[rows, slots] = columns.int()
    return indices_TK
