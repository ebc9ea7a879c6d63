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
from megatron_keye.kernels.visible_keys import keys_in_range


def dense_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return out_THC; see api.dense_attention."""
    dtype = accumulation_dtype(q_THC)
    (out_THC,) = map_row_chunks(
        functools.partial(_attend_rows, scale=scale),
        (q_THC, key_start_T, key_end_T),
        (k_SGC.to(dtype), v_SGC.to(dtype)),
        bytes_per_row=3 * q_THC.shape[1] * k_SGC.shape[0] * dtype.itemsize,
    )
    return out_THC


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
    q_TGHC = q_THC.to(k_SGC.dtype).unflatten(1, (k_SGC.shape[1], -1))
    logits_TGHS = torch.einsum("tghc,sgc->tghs", q_TGHC, k_SGC) * scale
    return masked_softmax(logits_TGHS, in_range_TS[:, None, None, :])


def _attend_rows(
    q_THC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    *,
    scale: float,
) -> tuple[Tensor]:
    """Return out_THC of one chunk of rows; keys come in the accumulation type."""
    in_range_TS = keys_in_range(key_start_T, key_end_T, k_SGC.shape[0])
    weights_TGHS = attention_weights(q_THC, k_SGC, in_range_TS, scale=scale)
    out_TGHC = torch.einsum("tghs,sgc->tghc", weights_TGHS, v_SGC)
    return (out_TGHC.flatten(1, 2).to(q_THC.dtype),)
