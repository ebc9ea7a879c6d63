# SPDX-License-Identifier: Apache-2.0
"""Eager form of the scores of selected keys.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

import torch
from torch import Tensor

from megatron_keye.kernels.indexer_heads import sum_indexer_heads
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.visible_keys import gather_selected


def selected_indexer_scores(
    q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, indices_TK: Tensor
) -> Tensor:
    """Return scores_TK; see api.selected_indexer_scores."""
    dtype = accumulation_dtype(q_TIJ, k_SJ, gate_TI)
    _, num_heads, num_channels = q_TIJ.shape
    (scores_TK,) = map_row_chunks(
        _score_rows,
        (q_TIJ, gate_TI, indices_TK),
        (k_SJ.to(dtype),),
        bytes_per_row=3 * (num_heads + num_channels) * indices_TK.shape[1] * dtype.itemsize,
    )
    return scores_TK


def _score_rows(q_TIJ: Tensor, gate_TI: Tensor, indices_TK: Tensor, k_SJ: Tensor) -> tuple[Tensor]:
    """Return scores_TK of one chunk of rows in the type of `k_SJ`."""
    k_TKJ, is_real_TK = gather_selected(k_SJ, indices_TK)
    dots_TIK = torch.einsum("tij,tkj->tik", q_TIJ.to(k_SJ.dtype), k_TKJ)
    scores_TK = sum_indexer_heads(dots_TIK, gate_TI, num_channels=k_SJ.shape[1])
    return (scores_TK.masked_fill(~is_real_TK, -torch.inf),)
