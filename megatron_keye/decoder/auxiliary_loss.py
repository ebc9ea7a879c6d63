# SPDX-License-Identifier: Apache-2.0
"""Attaches a loss to an activation, whose backward pass then includes that of the loss.

So the loss of a layer in any pipeline stage need not be sent to the last stage.
"""

from typing import Any

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = (loss.shape, loss.dtype, loss.device)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss_like
        return gradients[0], torch.ones(shape, dtype=dtype, device=device)


def attach_loss(activation: Tensor, loss: Tensor) -> Tensor:
    """Return `activation` unchanged; its backward pass adds the gradient of `loss` (weight 1).

    Args:
        activation: Any activation that the training loss depends on.
        loss: Scalar, already weighted.
    """
    attached: Tensor = _AttachLoss.apply(activation, loss)
    return attached
