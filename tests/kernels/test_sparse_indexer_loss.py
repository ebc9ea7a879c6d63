# SPDX-License-Identifier: Apache-2.0
"""Tests of the indexer's loss over the selected keys."""

import math

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_indexer_loss import sparse_indexer_loss
from tests.support.numerics import (
    assert_close,
    document_ranges,
    gradients,
    listed,
    loop_attention,
    loop_divergence,
    loop_scores,
    make_tensor,
    moved,
    odd_selection,
    trainable,
)

NUM_QUERIES, NUM_KEYS, NUM_GROUPS, NUM_HEADS, NUM_CHANNELS, K = 63, 100, 2, 6, 10, 17
SCALE = 0.3


def make_indexer() -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI."""
    return (
        make_tensor(NUM_QUERIES, 3, 12, seed=1),
        make_tensor(NUM_KEYS, 12, seed=2),
        make_tensor(NUM_QUERIES, 3, seed=3),
    )


def make_attention() -> tuple[Tensor, Tensor]:
    """Return query_THC and key_SGC."""
    return (
        make_tensor(NUM_QUERIES, NUM_HEADS, NUM_CHANNELS, seed=4),
        make_tensor(NUM_KEYS, NUM_GROUPS, NUM_CHANNELS, seed=5),
    )


def test_loss_equals_loops() -> None:
    indexer, (query_THC, key_SGC) = make_indexer(), make_attention()
    indices_TK = odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=7)
    whole = torch.zeros(NUM_QUERIES, dtype=torch.int64), torch.full((NUM_QUERIES,), NUM_KEYS)
    scores_TK = selected_indexer_scores(*indexer, indices_TK)
    _, target_TGK = sparse_attention(query_THC, key_SGC, key_SGC, indices_TK, scale=SCALE)
    _, target = loop_attention(query_THC, key_SGC, key_SGC, listed(indices_TK), SCALE)
    expected = loop_divergence(target, loop_scores(*indexer, *whole), listed(indices_TK))
    assert_close(sparse_indexer_loss(scores_TK, target_TGK), expected, 1e-12)


@pytest.mark.parametrize("num_queries", [1, 33])
def test_triton_equals_eager_in_float64(num_queries: int, fill_new_with_nan: None) -> None:
    indices_TK = odd_selection(num_queries, NUM_KEYS, K, seed=7)
    (scores_TK,) = moved((make_tensor(num_queries, K, seed=8, dtype=torch.float32),), "triton")
    scores_TK = scores_TK.masked_fill(indices_TK.to(scores_TK.device) < 0, -torch.inf)
    wanted_TGK = make_tensor(num_queries, NUM_GROUPS, K, seed=9).exp().to(scores_TK)
    target_TGK = wanted_TGK * scores_TK.isfinite()[:, None]
    target_TGK = (target_TGK / target_TGK.sum(2, keepdim=True)).nan_to_num(0)
    inputs = trainable((scores_TK, scores_TK.double()))
    kl_TG = sparse_indexer_loss(inputs[0], target_TGK, impl="triton")
    expected_TG = sparse_indexer_loss(inputs[1], target_TGK.double(), impl="eager")
    assert_close(kl_TG, expected_TG, 2e-6)
    (dscores_TK,) = gradients(kl_TG, inputs[0])
    (expected_TK,) = gradients(expected_TG, inputs[1])
    assert_close(dscores_TK, expected_TK, 2e-6)
    assert not dscores_TK[scores_TK.isneginf()].any(), "padding gets exactly 0"


@pytest.mark.parametrize("height", [1.0, 100.0])
def test_what_the_scores_give_and_what_the_target_gives_add_up(
    height: float, fill_new_with_nan: None
) -> None:
    """So a pass that knows the weights one by one needs no sum over a row."""
    from megatron_keye.kernels.sparse_indexer_loss.triton import scores_part

    indices_TK = odd_selection(33, NUM_KEYS, K, seed=7)
    indices_TK[4] = -1
    scores_TK = height * make_tensor(33, K, seed=8, dtype=torch.float32)
    (scores_TK,) = moved((scores_TK.masked_fill(indices_TK < 0, -torch.inf),), "triton")
    exact_TK = scores_TK.double().requires_grad_()
    is_real_TGK = scores_TK.isfinite()[:, None].expand(-1, NUM_GROUPS, -1)
    target_TGK = make_tensor(33, NUM_GROUPS, K, seed=9).to(exact_TK)
    target_TGK = target_TGK.masked_fill(~is_real_TGK, -torch.inf).softmax(2).nan_to_num(0)
    dkl_T = make_tensor(33, seed=10, dtype=torch.float32).to(scores_TK)
    lse_T, dscores_TK = scores_part(dkl_T, scores_TK, NUM_GROUPS)
    dscores_TK = dscores_TK - dkl_T[:, None] * target_TGK.sum(1)
    expected_TG = sparse_indexer_loss(exact_TK, target_TGK, impl="eager")
    dkl_TG = dkl_T.double()[:, None].expand_as(expected_TG)
    (expected_TK,) = torch.autograd.grad(expected_TG, exact_TK, dkl_TG)
    assert_close(dscores_TK, expected_TK, 2e-6)
    log_share_TK = (scores_TK - lse_T[:, None] * math.log(2)).masked_fill(~is_real_TGK[:, 0], 0)
    kl_TG = (torch.special.xlogy(target_TGK, target_TGK) - target_TGK * log_share_TK[:, None]).sum(
        2
    )
    assert_close(kl_TG, expected_TG, 2e-6)
    assert not lse_T[4] and not dscores_TK[scores_TK.isneginf()].any(), "no key, no part"


def test_selecting_everything_gives_the_dense_loss() -> None:
    indexer = trainable(make_indexer())
    query_THC, key_SGC = make_attention()
    ranges = document_ranges(20, 43)
    any_scores_TS = make_tensor(NUM_QUERIES, NUM_KEYS, seed=8)
    indices_TK = select_top_k(any_scores_TS, *ranges, NUM_KEYS)
    _, target_TGK = sparse_attention(query_THC, key_SGC, key_SGC, indices_TK, scale=SCALE)
    sparse_TG = sparse_indexer_loss(selected_indexer_scores(*indexer, indices_TK), target_TGK)
    weight_T = make_tensor(NUM_QUERIES, seed=98)
    dense, dense_TG = dense_indexer_loss(
        *indexer, query_THC, key_SGC, *ranges, weight_T, scale=SCALE
    )
    assert_close(sparse_TG, dense_TG, 1e-12)
    sparse = (weight_T[:, None] * sparse_TG).sum()
    for actual, expected in zip(
        *(torch.autograd.grad(loss, indexer) for loss in (sparse, dense)), strict=True
    ):
        assert_close(actual, expected, 1e-12)


def test_gradients_equal_finite_differences() -> None:
    shapes = [(5, 2, 4), (7, 4), (5, 2)]
    indexer = [make_tensor(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    query_THC, key_SGC = make_tensor(5, 6, 3, seed=4), make_tensor(7, 2, 3, seed=5)
    indices_TK = odd_selection(5, 7, 4, seed=9)
    _, target_TGK = sparse_attention(query_THC, key_SGC, key_SGC, indices_TK, scale=SCALE)

    def loss(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> Tensor:
        scores_TK = selected_indexer_scores(q_TIJ, k_SJ, gate_TI, indices_TK)
        return sparse_indexer_loss(scores_TK, target_TGK)

    assert torch.autograd.gradcheck(loss, indexer, fast_mode=True), "sparse"


def test_gradient_to_the_scores_is_softmax_minus_target() -> None:
    scores_TK = make_tensor(4, 5, seed=10)
    scores_TK[0] = scores_TK[1, 2:] = -torch.inf
    is_real_TK = scores_TK.isfinite()
    target_TGK = make_tensor(4, 1, 5, seed=11).exp() * is_real_TK[:, None]
    target_TGK[3, 0, 1] = 0
    target_TGK = (target_TGK / target_TGK.sum(2, keepdim=True)).nan_to_num(0)
    scores_TK.requires_grad_()
    kl_TG = sparse_indexer_loss(scores_TK, target_TGK)
    (gradient_TK,) = torch.autograd.grad(kl_TG.sum(), scores_TK)
    expected_TK = torch.softmax(scores_TK.detach(), 1).nan_to_num(0) - target_TGK[:, 0]
    assert_close(gradient_TK, expected_TK, 1e-14)
    assert not gradient_TK[~is_real_TK].any(), "padding gets exactly 0"
    assert kl_TG[0] == 0 and (kl_TG >= 0).all(), "no keys, no loss; never negative"


def test_loss_is_zero_when_the_indexer_equals_its_target() -> None:
    target_TGK = torch.softmax(make_tensor(NUM_QUERIES, 1, K, seed=12), 2)
    assert_close(
        sparse_indexer_loss(target_TGK[:, 0].log(), target_TGK), torch.zeros(63, 1), 1e-14
    )


def test_the_target_does_not_learn() -> None:
    scores_TK = make_tensor(3, 4, seed=14).requires_grad_()
    target_TGK = torch.full((3, 2, 4), 0.25, requires_grad=True)
    sparse_indexer_loss(scores_TK, target_TGK).sum().backward()
    assert target_TGK.grad is None, "the target is detached"


def test_a_misfit_is_named() -> None:
    scores_TK, target_TGK = torch.zeros(3, 4), torch.full((3, 2, 4), 0.25)
    with pytest.raises(ValueError, match="target_TGK: got K = 3"):
        sparse_indexer_loss(scores_TK, target_TGK[..., :3])
    with pytest.raises(ValueError, match="impl = 'fast'"):
        sparse_indexer_loss(scores_TK, target_TGK, impl="fast")
