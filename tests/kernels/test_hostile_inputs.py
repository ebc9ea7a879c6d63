# SPDX-License-Identifier: Apache-2.0
"""Named cases that broke other implementations of these operators, each through Triton.

Cases that belong to one operator alone stand in its own test file.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.dense_indexer_loss import dense_indexer_loss
from megatron_keye.kernels.indexer_scores import indexer_scores
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention import sparse_attention
from tests.support.numerics import (
    assert_norm_close,
    device,
    gradients,
    loop_top_k,
    make_tensor,
    moved,
    odd_selection,
    trainable,
)

SCALE = 0.3
NUM_QUERIES = 18


def make_heads(num_keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_THC, k_SGC and v_SGC."""
    q_THC = make_tensor(NUM_QUERIES, 2, 10, seed=1, dtype=dtype)
    k_SGC = make_tensor(num_keys, 1, 10, seed=2, dtype=dtype)
    v_SGC = make_tensor(num_keys, 1, 10, seed=3, dtype=dtype)
    return moved((q_THC, k_SGC, v_SGC), "triton")


def make_indexer(
    num_keys: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI."""
    q_TIJ = make_tensor(NUM_QUERIES, 2, 12, seed=4, dtype=dtype)
    k_SJ = make_tensor(num_keys, 12, seed=5, dtype=dtype)
    gate_TI = make_tensor(NUM_QUERIES, 2, seed=6, dtype=dtype)
    return moved((q_TIJ, k_SJ, gate_TI), "triton")


def far_apart(keys: Tensor, stride: int) -> Tensor:
    """Return the same rows, `stride` elements from each other; memory between is never touched."""
    size = (keys.shape[0] - 1) * stride + keys[0].numel()
    space = torch.empty(size, dtype=keys.dtype, device=keys.device)
    return space.as_strided(keys.shape, (stride, *keys.stride()[1:])).copy_(keys)


def test_more_places_than_keys_drop_no_gradient() -> None:
    (indices_TK,) = moved((odd_selection(NUM_QUERIES, 5, 23, seed=7),), "triton")
    heads, indexer = trainable(make_heads(5)), trainable(make_indexer(5))
    exact_heads, exact_indexer = (
        trainable(tuple(tensor.detach().double() for tensor in tensors))
        for tensors in (heads, indexer)
    )
    out_THC, _ = sparse_attention(*heads, indices_TK, scale=SCALE, impl="triton")
    expected_THC, _ = sparse_attention(*exact_heads, indices_TK, scale=SCALE, impl="eager")
    got = gradients(out_THC, *heads)
    wanted = gradients(expected_THC, *exact_heads)
    scores_TK = selected_indexer_scores(*indexer, indices_TK, impl="triton")
    expected_TK = selected_indexer_scores(*exact_indexer, indices_TK, impl="eager")
    got += gradients(scores_TK, *indexer)
    wanted += gradients(expected_TK, *exact_indexer)
    for actual, expected in zip(got, wanted, strict=True):
        assert_norm_close(actual, expected, 1e-5)


def test_queries_of_a_tile_do_not_read_each_others_selection() -> None:
    q_THC, k_SGC, v_SGC = make_heads(40)
    indices_TK = torch.arange(20).repeat(NUM_QUERIES, 1).int()
    indices_TK[1::2] += 20
    (indices_TK,) = moved((indices_TK,), "triton")
    before_THC, _ = sparse_attention(q_THC, k_SGC, v_SGC, indices_TK, scale=SCALE, impl="triton")
    k_SGC[20:], v_SGC[20:] = 50.0, -50.0
    after_THC, _ = sparse_attention(q_THC, k_SGC, v_SGC, indices_TK, scale=SCALE, impl="triton")
    assert torch.equal(after_THC[::2], before_THC[::2]), "the bits of those who selected others"
    assert not torch.equal(after_THC[1::2], before_THC[1::2]), "those who selected these"


def test_padding_of_a_selection_loads_no_indexer_key() -> None:
    q_TIJ, k_SJ, gate_TI = make_indexer(60)
    k_SJ[0] = k_SJ[50:] = torch.nan
    indices_TK = odd_selection(NUM_QUERIES, 49, 17, seed=8)
    indices_TK = torch.where(indices_TK < 0, -1, indices_TK + 1)
    indices_TK[::2, -1] = 60
    (indices_TK,) = moved((indices_TK,), "triton")
    inputs = trainable((q_TIJ, k_SJ, gate_TI))
    scores_TK = selected_indexer_scores(*inputs, indices_TK, impl="triton")
    assert torch.equal(scores_TK.isneginf(), (indices_TK < 0) | (indices_TK >= 60)), "-inf"
    dq_TIJ, dk_SJ, dgate_TI = gradients(scores_TK, *inputs)
    assert dq_TIJ.isfinite().all() and dgate_TI.isfinite().all(), "finite gradients"
    assert not dk_SJ[0].any() and not dk_SJ[50:].any(), "no gradient to keys never selected"


def test_rows_without_keys_have_an_infinite_log_sum_exp() -> None:
    from megatron_keye.kernels.sparse_attention.triton import attend
    from megatron_keye.kernels.union_lists import union_lists

    (indices_TK,) = moved((odd_selection(NUM_QUERIES, 40, 9, seed=9),), "triton")
    lists = union_lists(indices_TK, 40, impl="triton")
    _, lse_TH = attend(*make_heads(40), lists, scale=SCALE)
    assert (lse_TH[0] == torch.inf).all() and lse_TH[1:].isfinite().all(), "+inf by convention"


def test_gradients_have_the_types_of_their_inputs() -> None:
    (indices_TK,) = moved((odd_selection(NUM_QUERIES, 20, 9, seed=10),), "triton")
    heads = trainable(make_heads(20, torch.bfloat16))
    indexer = trainable(make_indexer(20, torch.bfloat16))
    out_THC, _ = sparse_attention(*heads, indices_TK, scale=SCALE, impl="triton")
    scores_TK = selected_indexer_scores(*indexer, indices_TK, impl="triton")
    found = [*gradients(out_THC, *heads), *gradients(scores_TK, *indexer)]
    assert all(gradient.dtype == torch.bfloat16 for gradient in found), "bfloat16"


@pytest.mark.parametrize(
    "case", ["lowest bits", "past float16", "nothing but -inf", "NaN", "NaN outside"]
)
def test_top_k_of_awkward_scores(case: str) -> None:
    scores_TS = make_tensor(4, 100, seed=11, dtype=torch.float32)
    expected_TS = scores_TS
    if case == "lowest bits":
        order_S = torch.randperm(100, generator=torch.Generator().manual_seed(12))
        scores_TS = (order_S.int() + 0x3F800000).view(torch.float32).expand(4, -1).contiguous()
        expected_TS = scores_TS
    elif case == "past float16":
        expected_TS = scores_TS = scores_TS * 1e35
    elif case == "nothing but -inf":
        expected_TS = scores_TS = torch.full_like(scores_TS, -torch.inf)
    end_T = torch.tensor([0, 5, 60, 90])
    if case == "NaN":
        scores_TS = scores_TS.masked_fill(scores_TS > 0.5, torch.nan)
        expected_TS = scores_TS.nan_to_num(nan=-torch.inf)
    elif case == "NaN outside":
        scores_TS = scores_TS.masked_fill(torch.arange(100) >= end_T[:, None], torch.nan)
    start_T = torch.zeros_like(end_T)
    expected = loop_top_k(expected_TS.double().numpy(), start_T, end_T, 17)
    got_TK = select_top_k(*moved((scores_TS, start_T, end_T), "triton"), 17, impl="triton")
    np.testing.assert_array_equal(got_TK.cpu().numpy(), expected)


def test_keys_past_two_to_the_31_elements() -> None:
    num_keys, stride = 18, 2**27
    q_THC, k_SGC, _ = make_heads(num_keys, torch.bfloat16)
    q_TIJ, k_SJ, gate_TI = make_indexer(num_keys, torch.bfloat16)
    (indices_TK,) = moved((odd_selection(NUM_QUERIES, num_keys, 9, seed=13),), "triton")
    start_T = torch.zeros(NUM_QUERIES, dtype=torch.int64, device=device("triton"))
    ranges = start_T, start_T + num_keys

    def score(k_SJ: Tensor) -> list[Tensor]:
        return [
            indexer_scores(q_TIJ, k_SJ, gate_TI, *ranges, impl="triton"),
            selected_indexer_scores(q_TIJ, k_SJ, gate_TI, indices_TK, impl="triton"),
        ]

    def attend(k_SGC: Tensor) -> list[Tensor]:
        heads = q_THC, k_SGC, k_SGC
        rest = q_THC, k_SGC, *ranges, torch.ones(len(q_THC), device=q_THC.device)
        return [
            sparse_attention(*heads, indices_TK, scale=SCALE, impl="triton")[0],
            dense_indexer_loss(q_TIJ, k_SJ, gate_TI, *rest, scale=SCALE, impl="triton")[1],
        ]

    near = [*score(k_SJ), *attend(k_SGC)]
    far = [*score(far_apart(k_SJ, stride)), *attend(far_apart(k_SGC, stride))]
    for actual, expected in zip(far, near, strict=True):
        assert torch.equal(actual, expected), "the same bits wherever the rows lie"


def test_scores_past_two_to_the_31_elements() -> None:
    (scores_TS,) = moved((make_tensor(3, 100, seed=14, dtype=torch.bfloat16),), "triton")
    start_T = torch.zeros(3, dtype=torch.int64, device=scores_TS.device)
    expected_TK = select_top_k(scores_TS, start_T, start_T + 100, 7, impl="triton")
    far_TS = far_apart(scores_TS, 2**30)
    got_TK = select_top_k(far_TS, start_T, start_T + 100, 7, impl="triton")
    assert torch.equal(got_TK, expected_TK), "rows far apart"
