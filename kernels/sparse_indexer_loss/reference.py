# SPDX-License-Identifier: Apache-2.0
"""Eager form of the sparse phase's indexer loss.

It defines the operator: other implementations are held to it.

Shape letters: T queries, G key-value heads, K selected keys.
"""

import functools

import torch
from torch import Tensor

from megatron_keye.kernels.masked_softmax import masked_divergence
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.row_chunks import map_row_chunks


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


def _divergence_rows(
    scores_TK: Tensor, target_TGK: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor]:
    """Return kl_TG of one chunk of rows over the selected keys."""
    return (masked_divergence(scores_TK.to(dtype), target_TGK.to(dtype), ~scores_TK.isneginf()),)
