# SPDX-License-Identifier: Apache-2.0
"""Eager form of the lightning indexer: scores, then top-k, a chunk of rows at a time.

It is the composition of the two operators' own definitions and adds none.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

import functools

import torch
from torch import Tensor

from megatron_keye.kernels.indexer_scores.reference import score_range
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.ranges import named
from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.select_top_k.reference import select_candidates
from megatron_keye.kernels.visible_keys import find_visible


@torch.no_grad()
def lightning_indexer(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    key_reach_S: Tensor | None,
) -> Tensor:
    """Return indices_TK; see api.lightning_indexer."""
    dtype = accumulation_dtype(q_TIJ, k_SJ, gate_TI)
    # The chunks of indexer_scores: the same rows in one product give the same bits.
    (indices_TK,) = map_row_chunks(
        functools.partial(_select_rows, k=k, key_reach_S=key_reach_S),
        (q_TIJ, gate_TI, key_start_T, key_end_T),
        (k_SJ.to(dtype),),
        bytes_per_row=3 * q_TIJ.shape[1] * k_SJ.shape[0] * dtype.itemsize,
    )
    return indices_TK


def _select_rows(
    q_TIJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k_SJ: Tensor,
    *,
    k: int,
    key_reach_S: Tensor | None,
) -> tuple[Tensor]:
    """Return indices_TK of one chunk of rows."""
    (scores_TS,) = score_range(q_TIJ, gate_TI, key_start_T, key_end_T, k_SJ)
    is_candidate_TS = find_visible(key_start_T, key_end_T, len(k_SJ), key_reach_S)
    with named("select_top_k"):
        return (select_candidates(scores_TS, is_candidate_TS, k),)
