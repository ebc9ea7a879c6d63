"""Ties the Triton loss of the warm-up into autograd.

Between forward and backward it keeps the inputs and a few numbers a query, never a matrix of
queries by keys.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, B tiles of queries.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.indexer_loss.triton_dense import dense_divergence
from megatron_keye.kernels.indexer_loss.triton_dense_backward import dense_divergence_backward
from megatron_keye.kernels.indexer_loss.triton_dense_lse import attention_lse
from megatron_keye.kernels.indexer_loss.triton_dense_tiles import DenseInputs, span_tiles


def dense_indexer_loss(
    tensors: tuple[Tensor, ...], attention_lse_TH: Tensor | None, *, scale: float
) -> Tensor:
    """Return kl_TG; see api.dense_indexer_loss, whose order the tensors have."""
    kl_TG: Tensor = _DenseLoss.apply(*DenseInputs(*tensors).checked(), attention_lse_TH, scale)
    return kl_TG


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, known_TH, scale = arguments
        inputs = DenseInputs(*tensors)
        num_queries, num_keys = inputs.sizes()
        ctx.scale, ctx.is_empty = scale, num_queries == 0 or num_keys == 0
        if ctx.is_empty:
            ctx.save_for_backward(*inputs)
            return torch.zeros(
                (num_queries, inputs.key_SGC.shape[1]),
                dtype=torch.float32,
                device=inputs.q_TIJ.device,
            )
        spans_B4 = span_tiles(inputs.key_start_T, inputs.key_end_T, num_keys)
        if known_TH is None:
            lse_TH = attention_lse(inputs, spans_B4, scale=scale)
        else:
            lse_TH = (known_TH.float() * math.log2(math.e)).contiguous()
        kl_TG, score_lse_T = dense_divergence(inputs, spans_B4, lse_TH, scale=scale)
        ctx.save_for_backward(*inputs, spans_B4, lse_TH, score_lse_T)
        return kl_TG

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl_TG: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: under activation recomputation they can't be read again.
        saved = ctx.saved_tensors
        inputs, found = DenseInputs(*saved[:7]), saved[7:]
        if ctx.is_empty:
            gradients = tuple(torch.zeros_like(tensor) for tensor in inputs[:3])
        else:
            gradients = dense_divergence_backward(
                dkl_TG.contiguous(), inputs, *found, scale=ctx.scale
            )
        return (*gradients, *(None,) * 6)
