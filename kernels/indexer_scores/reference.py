# SPDX-License-Identifier: Apache-2.0
"""Eager form of the indexer's scores.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, I indexer heads, J indexer channels.
"""

import torch
from torch import Tensor

from megatron_keye.kernels.indexer_heads import sum_indexer_heads
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.visible_keys import find_visible


def indexer_scores(
    q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, key_start_T: Tensor, key_end_T: Tensor
) -> Tensor:
    """Return scores_TS; see api.indexer_scores."""
    dtype = accumulation_dtype(q_TIJ, k_SJ, gate_TI)
    (scores_TS,) = map_row_chunks(
        score_range,
        (q_TIJ, gate_TI, key_start_T, key_end_T),
        (k_SJ.to(dtype),),
        bytes_per_row=3 * q_TIJ.shape[1] * k_SJ.shape[0] * dtype.itemsize,
    )
    return scores_TS


def score_range(
    q_TIJ: Tensor, gate_TI: Tensor, key_start_T: Tensor, key_end_T: Tensor, k_SJ: Tensor
) -> tuple[Tensor]:
    """Return scores_TS of one chunk of rows in the type of `k_SJ`, -inf outside the range."""
    dots_TIS = torch.einsum("tij,sj->tis", q_TIJ.to(k_SJ.dtype), k_SJ)
    scores_TS = sum_indexer_heads(dots_TIS, gate_TI, num_channels=k_SJ.shape[1])
    in_range_TS = find_visible(key_start_T, key_end_T, k_SJ.shape[0])
    return (scores_TS.masked_fill(~in_range_TS, -torch.inf),)
