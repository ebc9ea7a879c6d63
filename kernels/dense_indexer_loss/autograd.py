# SPDX-License-Identifier: Apache-2.0
"""Ties the Triton loss of the warm-up into autograd.

The forward pass makes the gradients too: both need attention weights and indexer scores of every
pair, and making these is most of the work. Memory stays linear in the row's length.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, B tiles of queries.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.dense_indexer_loss.triton.attention_lse import attention_lse
from megatron_keye.kernels.dense_indexer_loss.triton.loss import dense_divergence
from megatron_keye.kernels.dense_indexer_loss.triton.ranges import span_tiles
from megatron_keye.kernels.dense_indexer_loss.triton.tiles import DenseInputs
from megatron_keye.kernels.registration import opaque


def dense_indexer_loss(
    tensors: tuple[Any, ...],
    weight_T: Tensor,
    attention_lse_TH: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return loss and kl_TG; see api.dense_indexer_loss, whose order the tensors have."""
    inputs = DenseInputs(*tensors).checked()
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in inputs[:3])
    loss, kl_TG = _DenseLoss.apply(*inputs, weight_T, attention_lse_TH, scale, needs_gradients)
    return loss, kl_TG


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, weight_T, known_TH, scale, needs_gradients = arguments
        inputs = DenseInputs(*tensors)
        weight_T = weight_T.detach().float().contiguous()
        kl_TG, *gradients = _loss(*inputs, weight_T, known_TH, scale, needs_gradients)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs[:3]]
        ctx.mark_non_differentiable(kl_TG)
        return (weight_T[:, None] * kl_TG).sum(), kl_TG

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = ((gradient.float() * dloss).to(dtype) for gradient, dtype in gradients)
        return (*scaled, *(None,) * 9)


def _fake_loss(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    query_THC: Tensor,
    key_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    weight_T: Tensor,
    known_TH: Tensor | None,
    scale: float,
    needs_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kl_TG = weight_T.new_empty((q_TIJ.shape[0], key_SGC.shape[1]))
    return kl_TG, *_empty_gradients(q_TIJ, k_SJ, gate_TI, needs_gradients)


@opaque("dense_divergence", _fake_loss)
def _loss(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    query_THC: Tensor,
    key_SGC: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    weight_T: Tensor,
    known_TH: Tensor | None,
    scale: float,
    needs_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return kl_TG and the gradients of its weighted sum, without entries where not needed."""
    ranges = key_start_T, key_end_T, key_reach_S
    inputs = DenseInputs(q_TIJ, k_SJ, gate_TI, query_THC, key_SGC, *ranges)
    num_queries, num_keys = inputs.sizes()
    if num_queries == 0 or num_keys == 0:
        kl_TG = weight_T.new_zeros((num_queries, inputs.key_SGC.shape[1]))
        dq_TIJ, dk_SJ, dgate_TI = _empty_gradients(q_TIJ, k_SJ, gate_TI, needs_gradients)
        return kl_TG, dq_TIJ.zero_(), dk_SJ.zero_(), dgate_TI.zero_()
    spans_B4 = span_tiles(*inputs.range_arguments(), num_keys)
    if known_TH is None:
        lse_TH = attention_lse(inputs, spans_B4, scale=scale)
    else:
        lse_TH = (known_TH.float() * math.log2(math.e)).contiguous()
    kl_TG, gradients = dense_divergence(
        inputs, weight_T, spans_B4, lse_TH, scale=scale, with_gradients=needs_gradients
    )
    if gradients is None:
        return kl_TG, *_empty_gradients(q_TIJ, k_SJ, gate_TI, needs_gradients)
    return kl_TG, gradients.dq_TIJ, gradients.dk_SJ, gradients.dgate_TI


def _empty_gradients(
    q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, are_needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, gate = (each.shape if are_needed else (0,) for each in (q_TIJ, k_SJ, gate_TI))
    dk_SJ = k_SJ.new_empty(k, dtype=torch.float32)
    return q_TIJ.new_empty(q), dk_SJ, gate_TI.new_empty(gate)
