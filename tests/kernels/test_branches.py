# SPDX-License-Identifier: Apache-2.0
"""Where documents branch, each operator gives every query what it gives the path alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.dense_attention import dense_attention_with_lse
from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.indexer_scores import indexer_scores
from megatron_keye.kernels.lightning_indexer import lightning_indexer, paths, reference
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.trapezoids import Trapezoid, find_trapezoids
from megatron_keye.kernels.visible_keys import find_visible
from megatron_keye.plan.prefix_trees import PrefixTrees
from tests.support.numerics import (
    BRANCHES,
    assert_close,
    assert_norm_close,
    branched_ranges,
    gradients,
    loop_attention,
    loop_divergence,
    loop_scores,
    make_tensor,
    moved,
    trainable,
)

NUM_TOKENS, K, SCALE = sum(length for length, _ in BRANCHES), 6, 0.3
RANGES, REACH_S, KEYS = branched_ranges()


def make_heads(num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_THC, k_SGC and v_SGC."""
    shapes = ((num_tokens, 4, 10), (num_tokens, 2, 10), (num_tokens, 2, 10))
    q_THC, k_SGC, v_SGC = (make_tensor(*shape, seed=i) for i, shape in enumerate(shapes))
    return q_THC, k_SGC, v_SGC


def make_indexer(num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI."""
    shapes = ((num_tokens, 3, 12), (num_tokens, 12), (num_tokens, 3))
    q_TIJ, k_SJ, gate_TI = (make_tensor(*shape, seed=9 + i) for i, shape in enumerate(shapes))
    return q_TIJ, k_SJ, gate_TI


def zigzag(rank: int) -> Tensor:
    """Return the queries of one of two context ranks."""
    parts = torch.arange(NUM_TOKENS // 4 * 4).view(4, -1)
    return parts[[rank, 3 - rank]].flatten()


def test_a_query_sees_its_path() -> None:
    is_visible_TS = find_visible(*RANGES, NUM_TOKENS, REACH_S)
    assert [row.nonzero().flatten().tolist() for row in is_visible_TS] == KEYS


def test_trapezoids_of_a_branch_leave_out_those_beside_it() -> None:
    found = find_trapezoids(*RANGES, REACH_S)
    # The first child goes on from its parent, so that they are one.
    assert found[0] == Trapezoid(0, 23, 0, 0)
    assert found[1] == Trapezoid(23, 9, 0, 23, (slice(18, 23),))
    assert found[2] == Trapezoid(32, 3, 0, 32, (slice(11, 32),))
    assert found[1].earlier_keys == [slice(0, 18)] and found[1].triangle_keys == slice(23, 32)
    assert len(found) == 6, "two for the second document"
    assert find_trapezoids(*RANGES, REACH_S) is found, "remembered"
    assert len(find_trapezoids(*RANGES)) == 2, "documents alone"


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_dense_attention_is_that_of_the_path(impl: str, rank: int | None) -> None:
    order_T = torch.arange(NUM_TOKENS) if rank is None else zigzag(rank)
    q_THC, k_SGC, v_SGC = make_heads()
    inputs = trainable((q_THC[order_T], k_SGC, v_SGC))
    ranges = RANGES[0][order_T], RANGES[1][order_T]
    options: dict[str, Any] = {"scale": SCALE, "key_reach_S": REACH_S}
    out_THC, lse_TH = dense_attention_with_lse(*inputs, *ranges, **options, impl=impl)
    keys = [KEYS[query] for query in order_T.tolist()]
    assert_close(out_THC, loop_attention(*inputs, keys, SCALE)[0], 1e-12)
    eager_THC, eager_TH = dense_attention_with_lse(*inputs, *ranges, **options, impl="eager")
    assert_close(lse_TH, eager_TH, 1e-12)
    for actual, expected in zip(
        gradients(out_THC, *inputs), gradients(eager_THC, *inputs), strict=True
    ):
        assert_close(actual, expected, 1e-12)


def assert_selects_as_the_path_alone(indices_TK: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Compare with the selection of each path in a row of its own."""
    q_TIJ, k_SJ, gate_TI = (tensor.cpu() for tensor in inputs)
    for query, keys in enumerate(KEYS):
        one = torch.zeros(1, dtype=torch.int64), torch.tensor([len(keys)])
        rows = slice(query, query + 1)
        alone = lightning_indexer(q_TIJ[rows], k_SJ[keys], gate_TI[rows], *one, K, impl="eager")
        expected = [keys[place] if place >= 0 else -1 for place in alone[0].tolist()]
        assert indices_TK[query].tolist() == expected, f"query {query}"


@pytest.mark.parametrize("is_tied", [False, True])
def test_selections_are_those_of_the_path_alone(is_tied: bool) -> None:
    q_TIJ, k_SJ, gate_TI = make_indexer()
    inputs = (-q_TIJ.abs() if is_tied else q_TIJ, k_SJ.abs() if is_tied else k_SJ, gate_TI)
    options: dict[str, Any] = {"key_reach_S": REACH_S, "impl": "eager"}
    indices_TK = lightning_indexer(*inputs, *RANGES, K, **options)
    assert_selects_as_the_path_alone(indices_TK, inputs)

    def select(*arguments: Any) -> Tensor:
        return reference.lightning_indexer(*arguments, None)

    along_TK = paths.select_along_paths(select, *inputs, *RANGES, K, REACH_S)
    assert torch.equal(along_TK, indices_TK), "by ranges alone"
    order_T = zigzag(1)
    ranges = RANGES[0][order_T], RANGES[1][order_T]
    queries = inputs[0][order_T], k_SJ.abs() if is_tied else k_SJ, gate_TI[order_T]
    along_TK = paths.select_along_paths(select, *queries, *ranges, K, REACH_S)
    assert torch.equal(along_TK, indices_TK[order_T]), "a context rank's queries"


def test_triton_selects_as_the_path_alone() -> None:
    inputs = moved(tuple(tensor.float() for tensor in make_indexer()), "triton")
    ranges = moved((*RANGES, REACH_S), "triton")
    indices_TK = lightning_indexer(*inputs, *ranges[:2], K, key_reach_S=ranges[2], impl="triton")
    expected_TK = lightning_indexer(*inputs, *ranges[:2], K, key_reach_S=ranges[2], impl="eager")
    assert torch.equal(indices_TK, expected_TK)


def test_the_warm_ups_loss_is_over_the_path() -> None:
    indexer, (q_THC, k_SGC, _) = make_indexer(), make_heads()
    _, kl_TG = dense_indexer_loss(
        *indexer, q_THC, k_SGC, *RANGES, torch.ones(NUM_TOKENS), scale=SCALE, key_reach_S=REACH_S
    )
    _, target = loop_attention(q_THC, k_SGC, k_SGC, KEYS, SCALE)
    assert_close(kl_TG, loop_divergence(target, loop_scores(*indexer, *RANGES), KEYS), 1e-12)


@pytest.mark.parametrize("knows_lse", [False, True])
def test_triton_gives_the_warm_ups_loss_and_gradients(
    knows_lse: bool, fill_new_with_nan: None
) -> None:
    # More than a tile of queries, and a trunk that spans whole blocks of keys.
    branches = ((70, -1), (40, 0), (20, 1), (15, 0))
    ranges, reach_S, keys = branched_ranges(branches)
    *ranges, reach_S, weight_T = moved((*ranges, reach_S, make_tensor(145, seed=98)), "triton")
    attention = tuple(tensor.float() for tensor in make_heads(145)[:2])
    given: dict[str, Any] = {"scale": SCALE, "key_reach_S": reach_S}

    def results(dtype: torch.dtype, impl: str) -> list[Tensor]:
        indexer = trainable(moved(tuple(each.to(dtype) for each in make_indexer(145)), "triton"))
        query_THC, key_SGC = moved(tuple(each.to(dtype) for each in attention), "triton")
        heads = query_THC, key_SGC, key_SGC
        lse_TH = dense_attention_with_lse(*heads, *ranges, **given, impl="eager")[1]
        rest = query_THC, key_SGC, *ranges, weight_T, lse_TH if knows_lse else None
        loss, kl_TG = dense_indexer_loss(*indexer, *rest, **given, impl=impl)
        return [kl_TG, *torch.autograd.grad(loss, indexer)]

    got, wanted = results(torch.float32, "triton"), results(torch.float64, "eager")
    assert_close(got[0], wanted[0], 2e-5)
    for actual, expected in zip(got[1:], wanted[1:], strict=True):
        assert_norm_close(actual, expected, 5e-6)
    assert len(keys[-1]) == 85, "the last branch sees the first one and itself"


LONG = PrefixTrees(
    bounds=np.cumsum([0, 18_000, 700, 65, 4200, 1, 900, 134]),
    parents=np.array([-1, 0, 1, 1, 0, 0, -1]),
)
"""Branches on both sides of where cuDNN begins, and of lengths that no tile divides."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def long_row(rank: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return the queries of one of two context ranks, their ranges, and the reach of all keys."""
    order_T = torch.arange(int(LONG.bounds[-1])).view(4, -1)[[rank, 3 - rank]].flatten()
    starts = LONG.document_bounds[np.searchsorted(LONG.document_bounds, order_T, "right") - 1]
    ranges = torch.from_numpy(starts).cuda(), order_T.cuda() + 1
    return order_T.cuda(), ranges, torch.from_numpy(LONG.key_reach).cuda()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rank", [0, 1])
def test_a_gpus_dense_attention_is_that_of_the_path(rank: int) -> None:
    order_T, ranges, reach_S = long_row(rank)
    shapes = ((len(order_T), 8, 128), (len(reach_S), 2, 128), (len(reach_S), 2, 128))
    inputs = tuple(
        make_tensor(*shape, seed=seed, dtype=torch.bfloat16).cuda()
        for seed, shape in enumerate(shapes)
    )
    options: dict[str, Any] = {"scale": 128**-0.5, "key_reach_S": reach_S}
    half, wide = trainable(inputs), trainable(tuple(each.detach().float() for each in inputs))
    got = dense_attention_with_lse(*half, *ranges, **options)
    wanted = dense_attention_with_lse(*wide, *ranges, **options, impl="eager")
    assert_close(got[0].float(), wanted[0], 2e-2)
    assert_close(got[1], wanted[1], 1e-4)
    for actual, expected in zip(
        gradients(got[0], *half), gradients(wanted[0], *wide), strict=True
    ):
        assert_norm_close(actual, expected, 2e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_gpus_selections_are_those_of_the_path_alone(impl: str, rank: int) -> None:
    if impl == "cuda" and missing_reason("lightning_indexer") is not None:
        pytest.skip("megatron_keye._C is not built")
    order_T, ranges, reach_S = long_row(rank)
    shapes = ((len(order_T), 16, 64), (len(reach_S), 64), (len(order_T), 16))
    q_TIJ, k_SJ, gate_TI = (
        make_tensor(*shape, seed=seed, dtype=torch.bfloat16).cuda()
        for seed, shape in enumerate(shapes)
    )
    indices_TK = lightning_indexer(
        q_TIJ, k_SJ, gate_TI, *ranges, 2048, key_reach_S=reach_S, impl=impl
    )
    is_visible_TS = find_visible(*ranges, len(reach_S), reach_S)
    scores_TS = indexer_scores(q_TIJ, k_SJ, gate_TI, *ranges, impl="triton")
    # What a query does not see ranks below all that it sees, and is then taken out.
    scores_TS.masked_fill_(~is_visible_TS, -torch.inf)
    expected_TK = select_top_k(scores_TS, *ranges, 2048, impl="triton")
    is_taken_TK = is_visible_TS.gather(1, expected_TK.clamp(min=0).long()) & (expected_TK >= 0)
    largest = torch.iinfo(torch.int32).max
    expected_TK = expected_TK.masked_fill(~is_taken_TK, largest).sort(dim=1).values
    assert torch.equal(indices_TK, expected_TK.masked_fill(expected_TK == largest, -1))


def test_a_misfit_is_named() -> None:
    heads, options = make_heads(), {"scale": SCALE, "key_reach_S": REACH_S[1:]}
    with pytest.raises(ValueError, match=r"key_reach_S: got shape \(61,\)"):
        dense_attention_with_lse(*heads, *RANGES, **options)
    with pytest.raises(ValueError, match="key_reach_S: got torch.int32"):
        lightning_indexer(*make_indexer(), *RANGES, K, key_reach_S=REACH_S.int())
    assert np.array_equal(REACH_S[:11], [48] * 11), "all of the document"
