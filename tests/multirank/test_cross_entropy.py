# SPDX-License-Identifier: Apache-2.0
"""The language loss in float64, with the vocabulary on one rank and split over two."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.decoder.cross_entropy import token_losses
from tests.support.numerics import make_tensor
from tests.support.ranks import run_on_ranks

LABELS = torch.tensor([[0], [5], [9], [4]])
"""First and last entry of each half of a vocabulary of ten."""


def expected() -> tuple[Tensor, Tensor]:
    """Return losses and the gradient of their weighted sum, by torch's own cross entropy."""
    logits = make_tensor(4, 10, seed=1).requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits, LABELS[:, 0], reduction="none")
    (losses * torch.arange(1, 5)).sum().backward()
    assert logits.grad is not None, "just computed"
    return losses.detach(), logits.grad


def _on_rank() -> tuple[Tensor, Tensor]:
    rank, size = dist.get_rank(), 10 // dist.get_world_size()
    whole = make_tensor(4, 1, 10, seed=1)
    logits = whole[..., rank * size : (rank + 1) * size].clone().requires_grad_()
    losses = token_losses(logits, LABELS, dist.group.WORLD)
    (losses[:, 0] * torch.arange(1, 5)).sum().backward()
    assert logits.grad is not None, "just computed"
    return losses[:, 0].detach(), logits.grad[:, 0]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_split_vocabulary_gives_the_exact_loss_and_gradient(num_ranks: int) -> None:
    losses, gradient = expected()
    found = run_on_ranks(num_ranks, _on_rank)
    for got, _ in found:
        torch.testing.assert_close(got, losses, rtol=0, atol=1e-14)
    parts = torch.cat([part for _, part in found], dim=1)
    torch.testing.assert_close(parts, gradient, rtol=0, atol=1e-14)
