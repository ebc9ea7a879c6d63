# SPDX-License-Identifier: Apache-2.0
"""Ties the Triton loss of the sparse phase into autograd.

Shape letters: T queries, G key-value heads, K selected keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.registration import opaque
from megatron_keye.kernels.sparse_indexer_loss.triton import divergence, divergence_backward


def sparse_indexer_loss(scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
    """Return kl_TG; see api.sparse_indexer_loss."""
    kl_TG: Tensor = _SparseLoss.apply(scores_TK, target_TGK.detach())
    return kl_TG


def _fake_diverge(scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
    return scores_TK.new_empty(target_TGK.shape[:2], dtype=torch.float32)


@opaque("sparse_divergence", _fake_diverge)
def _diverge(scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
    return divergence(scores_TK, target_TGK)


def _fake_diverge_backward(dkl_TG: Tensor, scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
    return torch.empty_like(scores_TK)


@opaque("sparse_divergence_backward", _fake_diverge_backward)
def _diverge_backward(dkl_TG: Tensor, scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
    return divergence_backward(dkl_TG, scores_TK, target_TGK)


class _SparseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_TK: Tensor, target_TGK: Tensor) -> Tensor:
        scores_TK, target_TGK = scores_TK.contiguous(), target_TGK.contiguous()
        ctx.save_for_backward(scores_TK, target_TGK)
        return _diverge(scores_TK, target_TGK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl_TG: Tensor) -> tuple[Tensor, None]:
        return _diverge_backward(dkl_TG.contiguous(), *ctx.saved_tensors), None
