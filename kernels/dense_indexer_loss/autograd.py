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
        kl_TG, gradients = _loss(inputs, weight_T, known_TH, scale, needs_gradients)
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


def _loss(
    inputs: DenseInputs,
    weight_T: Tensor,
    known_TH: Tensor | None,
    scale: float,
    needs_gradients: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return kl_TG and the gradients of its weighted sum, none where none are needed."""
    num_queries, num_keys = inputs.sizes()
    if num_queries == 0 or num_keys == 0:
        kl_TG = weight_T.new_zeros((num_queries, inputs.key_SGC.shape[1]))
        return kl_TG, tuple(torch.zeros_like(tensor) for tensor in inputs[:3])
    spans_B4 = span_tiles(*inputs.range_arguments(), num_keys)
    if known_TH is None:
        lse_TH = attention_lse(inputs, spans_B4, scale=scale)
    else:
        lse_TH = (known_TH.float() * math.log2(math.e)).contiguous()
    kl_TG, gradients = dense_divergence(
        inputs, weight_T, spans_B4, lse_TH, scale=scale, with_gradients=needs_gradients
    )
    if gradients is None:
        return kl_TG, ()
    return kl_TG, (gradients.dq_TIJ, gradients.dk_SJ, gradients.dgate_TI)
