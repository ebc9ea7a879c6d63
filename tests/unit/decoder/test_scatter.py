# SPDX-License-Identifier: Apache-2.0
"""Features replace their placeholders, and a mismatch is refused."""

import pytest
import torch

from megatron_keye.decoder.auxiliary_loss import attach_loss
from megatron_keye.decoder.scatter import scatter_features


def test_features_replace_placeholders_and_nothing_else() -> None:
    embeddings = torch.randn(6, 1, 3, requires_grad=True)
    features = torch.randn(2, 3, requires_grad=True)
    positions = torch.tensor([1, 4])
    out = scatter_features(embeddings, features, positions, where="rank 0")
    assert torch.equal(out[positions, 0], features)
    rest = torch.tensor([0, 2, 3, 5])
    assert torch.equal(out[rest], embeddings[rest])
    out.sum().backward()
    assert torch.equal(features.grad, torch.ones(2, 3))
    assert torch.equal(embeddings.grad[positions], torch.zeros(2, 1, 3))


@pytest.mark.parametrize("num_features", [0, 1, 3])
def test_a_mismatch_names_rank_and_sample(num_features: int) -> None:
    with pytest.raises(ValueError, match="rank 3, row of a.jsonl:7: got .* for 2 placeholders"):
        scatter_features(
            torch.zeros(6, 1, 3),
            torch.zeros(num_features, 3),
            torch.tensor([1, 4]),
            where="rank 3, row of a.jsonl:7",
        )


def test_a_rank_without_features_still_hears_when_their_gradient_is_due() -> None:
    embeddings = torch.ones(3, 1, 2, requires_grad=True)
    features = torch.empty(0, 2, requires_grad=True)
    due = []
    features.register_post_accumulate_grad_hook(lambda leaf: due.append(leaf.grad))
    positions = torch.empty(0, dtype=torch.int64)
    scatter_features(embeddings, features, positions, where="rank 0").sum().backward()
    assert [tuple(gradient.shape) for gradient in due] == [(0, 2)]


def test_an_attached_loss_adds_its_gradient_and_changes_no_value() -> None:
    x = torch.randn(4, requires_grad=True)
    w = torch.randn(4, requires_grad=True)
    out = attach_loss(x * 2, (w**2).sum() * 0.5)
    assert torch.equal(out, x * 2)
    out.sum().backward()
    torch.testing.assert_close(w.grad, w.detach())
    torch.testing.assert_close(x.grad, torch.full((4,), 2.0))
