"""Eager form of the indexer's scores.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

import math

import torch
from torch import Tensor

from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.visible_keys import gather_selected, keys_in_range


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


def selected_indexer_scores(
    q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, indices_TK: Tensor
) -> Tensor:
    """Return scores_TK; see api.selected_indexer_scores."""
    dtype = accumulation_dtype(q_TIJ, k_SJ, gate_TI)
    _, num_heads, num_channels = q_TIJ.shape
    (scores_TK,) = map_row_chunks(
        _score_selected,
        (q_TIJ, gate_TI, indices_TK),
        (k_SJ.to(dtype),),
        bytes_per_row=3 * (num_heads + num_channels) * indices_TK.shape[1] * dtype.itemsize,
    )
    return scores_TK


def score_range(
    q_TIJ: Tensor, gate_TI: Tensor, key_start_T: Tensor, key_end_T: Tensor, k_SJ: Tensor
) -> tuple[Tensor]:
    """Return scores_TS of one chunk of rows in the type of `k_SJ`, -inf outside the range."""
    dots_TIS = torch.einsum("tij,sj->tis", q_TIJ.to(k_SJ.dtype), k_SJ)
    scores_TS = _sum_heads(dots_TIS, gate_TI, num_channels=k_SJ.shape[1])
    in_range_TS = keys_in_range(key_start_T, key_end_T, k_SJ.shape[0])
    return (scores_TS.masked_fill(~in_range_TS, -torch.inf),)


def _score_selected(
    q_TIJ: Tensor, gate_TI: Tensor, indices_TK: Tensor, k_SJ: Tensor
) -> tuple[Tensor]:
    """Return scores_TK of one chunk of rows in the type of `k_SJ`."""
    k_TKJ, is_real_TK = gather_selected(k_SJ, indices_TK)
    dots_TIK = torch.einsum("tij,tkj->tik", q_TIJ.to(k_SJ.dtype), k_TKJ)
    scores_TK = _sum_heads(dots_TIK, gate_TI, num_channels=k_SJ.shape[1])
    return (scores_TK.masked_fill(~is_real_TK, -torch.inf),)


def _sum_heads(dots_TIS: Tensor, gate_TI: Tensor, *, num_channels: int) -> Tensor:
    """Return the gated sum over heads [T, S] of the rectified products."""
    sums_TS: Tensor = torch.einsum("ti,tis->ts", gate_TI.to(dots_TIS.dtype), dots_TIS.relu())
    return sums_TS / math.sqrt(num_channels)
