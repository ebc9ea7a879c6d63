# SPDX-License-Identifier: Apache-2.0
"""Eager form of the dense attention.

It defines the operator: other implementations are held to it.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head. Beside
a G, H stands for the H / G heads of one group.
"""

import functools

import torch
from torch import Tensor

from megatron_keye.kernels.masked_softmax import masked_softmax
from megatron_keye.kernels.precision import accumulation_dtype
from megatron_keye.kernels.row_chunks import map_row_chunks
from megatron_keye.kernels.visible_keys import find_visible


def dense_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH; see api.dense_attention_with_lse."""
    dtype = accumulation_dtype(q_THC)
    out_THC, lse_TH = map_row_chunks(
        functools.partial(_attend_rows, key_reach_S=key_reach_S, scale=scale),
        (q_THC, key_start_T, key_end_T),
        (k_SGC.to(dtype), v_SGC.to(dtype)),
        bytes_per_row=3 * q_THC.shape[1] * k_SGC.shape[0] * dtype.itemsize,
    )
    return out_THC, lse_TH.detach()


def attention_weights(
    q_THC: Tensor, k_SGC: Tensor, in_range_TS: Tensor, *, scale: float
) -> Tensor:
    """Return weights_TGHS, each head's softmax over the admitted keys, in the type of `k_SGC`.

    Args:
        q_THC: Queries of one chunk of rows, any float type.
        k_SGC: Keys in the accumulation type.
        in_range_TS: bool, which keys a query sees.
        scale: Factor of the logits.
    """
    return masked_softmax(_logits(q_THC, k_SGC, scale), in_range_TS[:, None, None, :])


def _logits(q_THC: Tensor, k_SGC: Tensor, scale: float) -> Tensor:
    """Return the scaled logits [T, G, H, S] in the type of `k_SGC`."""
    q_TGHC = q_THC.to(k_SGC.dtype).unflatten(1, (k_SGC.shape[1], -1))
    return torch.einsum("tghc,sgc->tghs", q_TGHC, k_SGC) * scale


def _attend_rows(
    q_THC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    *,
    key_reach_S: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH of one chunk of rows; keys come in the accumulation type."""
    mask_TS = find_visible(key_start_T, key_end_T, k_SGC.shape[0], key_reach_S)
    mask_TGHS = mask_TS[:, None, None, :]
    logits_TGHS = _logits(q_THC, k_SGC, scale)
    out_TGHC = torch.einsum("tghs,sgc->tghc", masked_softmax(logits_TGHS, mask_TGHS), v_SGC)
    lse_TGH = logits_TGHS.detach().masked_fill(~mask_TGHS, -torch.inf).logsumexp(dim=3)
    lse_TGH.masked_fill_(lse_TGH.isneginf(), torch.inf)
    return out_TGHC.flatten(1, 2).to(q_THC.dtype), lse_TGH.flatten(1, 2)
