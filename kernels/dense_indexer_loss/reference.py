# SPDX-License-Identifier: Apache-2.0
"""Eager form of the warm-up's indexer loss.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head.
"""

import functools

from torch import Tensor

from megatron_keye.kernels.dense_attention.reference import attention_weights
from megatron_keye.kernels.indexer_scores.reference import score_range
from megatron_keye.kernels.masked_softmax import masked_divergence
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.visible_keys import find_visible


def dense_indexer_loss(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    query_THC: Tensor,
    key_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    weight_T: Tensor,
    key_reach_S: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return loss and kl_TG; see api.dense_indexer_loss."""
    dtype = accumulation_dtype(q_TIJ, k_SJ, gate_TI, query_THC, key_SGC)
    num_matrices = q_TIJ.shape[1] + query_THC.shape[1]
    (kl_TG,) = map_row_chunks(
        functools.partial(_divergence_rows, key_reach_S=key_reach_S, scale=scale),
        (q_TIJ, gate_TI, query_THC.detach(), key_start_T, key_end_T),
        (k_SJ.to(dtype), key_SGC.detach().to(dtype)),
        bytes_per_row=3 * num_matrices * k_SJ.shape[0] * dtype.itemsize,
    )
    return (weight_T.detach().to(dtype)[:, None] * kl_TG).sum(), kl_TG.detach()


def _divergence_rows(
    q_TIJ: Tensor,
    gate_TI: Tensor,
    query_THC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k_SJ: Tensor,
    key_SGC: Tensor,
    *,
    key_reach_S: Tensor | None,
    scale: float,
) -> tuple[Tensor]:
    """Return kl_TG of one chunk of rows over all visible keys."""
    is_visible_TS = find_visible(key_start_T, key_end_T, k_SJ.shape[0], key_reach_S)
    target_TGS = attention_weights(query_THC, key_SGC, is_visible_TS, scale=scale).mean(dim=2)
    (scores_TS,) = score_range(q_TIJ, gate_TI, key_start_T, key_end_T, k_SJ)
    return (masked_divergence(scores_TS, target_TGS, is_visible_TS),)
