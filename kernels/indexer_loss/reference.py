"""Eager form of the indexer's losses.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, K selected keys.
"""

import functools

import torch
from torch import Tensor

from megatron_keye.kernels.dense_attention.reference import attention_weights
from megatron_keye.kernels.indexer_scores.reference import score_range
from megatron_keye.kernels.masked_softmax import masked_log_softmax
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.visible_keys import keys_in_range


def sparse_indexer_loss(scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
    """Return kl_TG; see api.sparse_indexer_loss."""
    dtype = accumulation_dtype(scores_TK, target_TGK)
    num_groups, num_selected = target_TGK.shape[1:]
    (kl_TG,) = map_row_chunks(
        functools.partial(_divergence_rows, dtype=dtype),
        (scores_TK, target_TGK.detach()),
        (),
        bytes_per_row=3 * (num_groups + 1) * num_selected * dtype.itemsize,
    )
    return kl_TG


def dense_indexer_loss(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    query_THC: Tensor,
    key_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    weight_T: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return loss and kl_TG; see api.dense_indexer_loss."""
    dtype = accumulation_dtype(q_TIJ, k_SJ, gate_TI, query_THC, key_SGC)
    num_matrices = q_TIJ.shape[1] + query_THC.shape[1]
    (kl_TG,) = map_row_chunks(
        functools.partial(_dense_rows, scale=scale),
        (q_TIJ, gate_TI, query_THC.detach(), key_start_T, key_end_T),
        (k_SJ.to(dtype), key_SGC.detach().to(dtype)),
        bytes_per_row=3 * num_matrices * k_SJ.shape[0] * dtype.itemsize,
    )
    return (weight_T.detach().to(dtype)[:, None] * kl_TG).sum(), kl_TG.detach()


def _divergence_rows(
    scores_TK: Tensor, target_TGK: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor]:
    """Return kl_TG of one chunk of rows over the selected keys."""
    return (_divergence(scores_TK.to(dtype), target_TGK.to(dtype), ~scores_TK.isneginf()),)


def _dense_rows(
    q_TIJ: Tensor,
    gate_TI: Tensor,
    query_THC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k_SJ: Tensor,
    key_SGC: Tensor,
    *,
    scale: float,
) -> tuple[Tensor]:
    """Return kl_TG of one chunk of rows over the whole range."""
    in_range_TS = keys_in_range(key_start_T, key_end_T, k_SJ.shape[0])
    target_TGS = attention_weights(query_THC, key_SGC, in_range_TS, scale=scale).mean(dim=2)
    (scores_TS,) = score_range(q_TIJ, gate_TI, key_start_T, key_end_T, k_SJ)
    return (_divergence(scores_TS, target_TGS, in_range_TS),)


def _divergence(scores_TS: Tensor, target_TGS: Tensor, mask_TS: Tensor) -> Tensor:
    """Return KL(target || softmax of scores where the mask holds) [T, G]; 0 log 0 is 0."""
    log_softmax_TS = masked_log_softmax(scores_TS, mask_TS)
    negative_entropy_TG: Tensor = torch.special.xlogy(target_TGS, target_TGS).sum(dim=2)
    cross_TG: Tensor = torch.einsum("tgs,ts->tg", target_TGS, log_softmax_TS)
    return negative_entropy_TG - cross_TG
