# SPDX-License-Identifier: Apache-2.0
"""Tests of the exact top-k selection."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_keye.kernels import row_chunks
from megatron_keye.kernels.select_top_k import select_top_k
from tests.support.numerics import (
    document_ranges,
    loop_top_k,
    make_tensor,
    moved,
    odd_ranges,
    to_float64,
)

NUM_QUERIES, NUM_KEYS = 63, 100


def few_values(scores_TS: Tensor) -> Tensor:
    """Return scores of which most are tied."""
    return scores_TS.round()


def signed_zeros(scores_TS: Tensor) -> Tensor:
    """Return zeros of both signs with a few other numbers."""
    return torch.where(scores_TS.abs() < 1.5, scores_TS * 0.0, scores_TS)


def infinities(scores_TS: Tensor) -> Tensor:
    """Return scores with -inf and +inf among them."""
    return torch.where(scores_TS.abs() > 1, torch.inf * scores_TS.sign(), scores_TS)


CASES: list[Callable[[Tensor], Tensor]] = [
    torch.clone,
    few_values,
    signed_zeros,
    infinities,
    torch.zeros_like,
]


@pytest.mark.parametrize("change", CASES)
@pytest.mark.parametrize("k", [1, 17, NUM_KEYS, 130])
def test_selection_equals_sorting(change: Callable[[Tensor], Tensor], k: int) -> None:
    scores_TS = change(make_tensor(NUM_QUERIES, NUM_KEYS, seed=1))
    start_T, end_T = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=2)
    indices_TK = select_top_k(scores_TS, start_T, end_T, k)
    assert indices_TK.dtype == torch.int32, "index type"
    expected = loop_top_k(to_float64(scores_TS), start_T, end_T, k)
    np.testing.assert_array_equal(indices_TK.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_is_exact_in_other_types(dtype: torch.dtype) -> None:
    scores_TS = make_tensor(NUM_QUERIES, NUM_KEYS, seed=3, dtype=dtype)
    ranges = document_ranges(20, 43)
    expected = loop_top_k(to_float64(scores_TS), *ranges, 9)
    np.testing.assert_array_equal(select_top_k(scores_TS, *ranges, 9).numpy(), expected)


@pytest.mark.parametrize("change", CASES)
def test_triton_equals_sorting(change: Callable[[Tensor], Tensor]) -> None:
    scores_TS = change(make_tensor(8, NUM_KEYS, seed=1, dtype=torch.float32))
    ranges = odd_ranges(8, NUM_KEYS, seed=2)
    expected = loop_top_k(to_float64(scores_TS), *ranges, 17)
    on_device = moved((scores_TS, *ranges), "triton")
    got_TK = select_top_k(*on_device, 17, impl="triton")
    np.testing.assert_array_equal(got_TK.cpu().numpy(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("change", CASES)
@pytest.mark.parametrize("k", [1, 2048])
def test_triton_equals_eager_on_long_rows(change: Callable[[Tensor], Tensor], k: int) -> None:
    scores_TS = change(make_tensor(64, 70_001, seed=1, dtype=torch.float32)).cuda()
    ranges = moved(odd_ranges(64, 70_001, seed=2), "triton")
    expected_TK = select_top_k(scores_TS, *ranges, k, impl="eager")
    assert torch.equal(select_top_k(scores_TS, *ranges, k, impl="triton"), expected_TK)


def test_equal_scores_give_the_first_keys() -> None:
    scores_TS = torch.zeros(2, NUM_KEYS)
    scores_TS[:, ::2] = -0.0
    start_T, end_T = torch.tensor([0, 30]), torch.tensor([NUM_KEYS, 90])
    indices_TK = select_top_k(scores_TS, start_T, end_T, 5)
    assert indices_TK.tolist() == [[0, 1, 2, 3, 4], [30, 31, 32, 33, 34]], "ties to the lower key"


def test_nan_outside_the_range_is_not_seen() -> None:
    scores_TS = make_tensor(3, NUM_KEYS, seed=4)
    scores_TS[:, 10:] = torch.nan
    start_T, end_T = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3, 10])
    indices_TK = select_top_k(scores_TS, start_T, end_T, 4)
    assert indices_TK[0].tolist() == [-1] * 4, "empty range"
    assert indices_TK[1].tolist() == [0, 1, 2, -1], "fewer candidates than k"
    assert (indices_TK[2] >= 0).all() and (indices_TK[2] < 10).all(), "inside the range"


def test_nan_inside_the_range_ranks_below_all_numbers() -> None:
    nan, inf = torch.nan, torch.inf
    scores_TS = torch.tensor([[nan, 1, nan, -inf, 2], [nan, 3, nan, nan, nan]])
    whole = torch.zeros(2, dtype=torch.int64), torch.full((2,), 5)
    assert select_top_k(scores_TS, *whole, 2).tolist() == [[1, 4], [0, 1]]
    assert select_top_k(scores_TS, *whole, 4).tolist() == [[0, 1, 3, 4], [0, 1, 2, 3]]


def test_selection_is_invariant_to_chunks_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    scores_TS = few_values(make_tensor(NUM_QUERIES, NUM_KEYS, seed=6))
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=7)
    expected_TK = select_top_k(scores_TS, *ranges, 17)
    strided_TS = scores_TS.T.contiguous().T
    assert torch.equal(select_top_k(strided_TS, *ranges, 17), expected_TK), "non-contiguous"
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 1)
    assert torch.equal(select_top_k(scores_TS, *ranges, 17), expected_TK), "one row per chunk"


def test_no_queries_and_no_keys() -> None:
    none_T = torch.empty(0, dtype=torch.int64)
    assert select_top_k(torch.empty(0, 7), none_T, none_T, 3).shape == (0, 3), "no queries"
    zero_T = torch.zeros(2, dtype=torch.int64)
    assert select_top_k(torch.empty(2, 0), zero_T, zero_T, 3).tolist() == [[-1] * 3] * 2, "no keys"


def test_a_misfit_is_named() -> None:
    scores_TS = torch.zeros(2, 5)
    zero_T = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="k: got 0, expected 1 or more"):
        select_top_k(scores_TS, zero_T, zero_T, 0)
    with pytest.raises(ValueError, match="impl = 'fast', expected one of eager, triton, cuda"):
        select_top_k(scores_TS, zero_T, zero_T, 1, impl="fast")
    with pytest.raises(ValueError, match="scores_TS: got torch.int64"):
        select_top_k(scores_TS.long(), zero_T, zero_T, 1)
