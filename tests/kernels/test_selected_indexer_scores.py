# SPDX-License-Identifier: Apache-2.0
"""Tests of the indexer's scores of selected keys."""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels import row_chunks
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    gradients,
    loop_scores,
    make_selection,
    make_tensor,
    moved,
    odd_selection,
    trainable,
)

NUM_QUERIES, NUM_KEYS, NUM_HEADS, NUM_CHANNELS = 63, 100, 3, 12


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI."""
    return (
        make_tensor(NUM_QUERIES, NUM_HEADS, NUM_CHANNELS, seed=1),
        make_tensor(NUM_KEYS, NUM_CHANNELS, seed=2),
        make_tensor(NUM_QUERIES, NUM_HEADS, seed=3),
    )


def test_selected_scores_equal_the_scores_of_the_range() -> None:
    inputs, indices_TK = make_inputs(), odd_selection(NUM_QUERIES, NUM_KEYS, k=17, seed=5)
    whole = torch.zeros(NUM_QUERIES, dtype=torch.int64), torch.full((NUM_QUERIES,), NUM_KEYS)
    expected_TS = torch.from_numpy(loop_scores(*inputs, *whole))
    expected_TK = expected_TS.gather(1, indices_TK.long().clamp(min=0))
    expected_TK[indices_TK < 0] = -torch.inf
    assert_close(selected_indexer_scores(*inputs, indices_TK), expected_TK, 1e-12)
    assert_close(selected_indexer_scores(*inputs, indices_TK.long()), expected_TK, 1e-12)


def test_a_repeated_index_is_scored_each_time() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    indices_TK = torch.full((NUM_QUERIES, 3), 7)
    scores_TK = selected_indexer_scores(q_TIJ, k_SJ, gate_TI, indices_TK)
    assert torch.equal(scores_TK[:, 0], scores_TK[:, 2]), "the same key scored twice"


def test_padding_loads_no_key() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    k_SJ[0] = k_SJ[50:] = torch.nan
    indices_TK = odd_selection(NUM_QUERIES, 49, k=17, seed=6)
    indices_TK = torch.where(indices_TK < 0, -1, indices_TK + 1)
    indices_TK[:, -1] = NUM_KEYS + 5
    inputs = trainable((q_TIJ, k_SJ, gate_TI))
    scores_TK = selected_indexer_scores(*inputs, indices_TK)
    assert torch.equal(scores_TK.isneginf(), (indices_TK < 0) | (indices_TK >= NUM_KEYS)), "-inf"
    dq_TIJ, dk_SJ, dgate_TI = gradients(scores_TK, *inputs)
    assert dq_TIJ.isfinite().all() and dgate_TI.isfinite().all(), "finite gradients"
    assert not dk_SJ[0].any() and not dk_SJ[50:].any(), "no gradient to keys never selected"
    assert not dq_TIJ[0].any() and not dgate_TI[0].any(), "no gradient to a query without keys"


def test_gradients_equal_finite_differences() -> None:
    inputs = [
        make_tensor(*shape, seed=seed).requires_grad_()
        for seed, shape in enumerate([(5, 2, 4), (6, 4), (5, 2)])
    ]
    indices_TK = odd_selection(5, 6, k=4, seed=7)

    def scores(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> Tensor:
        scores_TK = selected_indexer_scores(q_TIJ, k_SJ, gate_TI, indices_TK)
        return scores_TK[scores_TK.isfinite()]

    assert torch.autograd.gradcheck(scores, inputs, fast_mode=True), "selection"


def test_results_are_invariant_to_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = trainable(make_inputs())
    indices_TK = odd_selection(NUM_QUERIES, NUM_KEYS, k=17, seed=9)

    def everything() -> list[Tensor]:
        scores_TK = selected_indexer_scores(*inputs, indices_TK)
        return [scores_TK, *gradients(scores_TK, *inputs)]

    whole = everything()
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 7 * 3 * NUM_HEADS * NUM_KEYS * 8)
    for chunked, expected in zip(everything(), whole, strict=True):
        assert_close(chunked, expected, 1e-13)


def test_a_row_without_keys_at_all() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    no_keys_TK = selected_indexer_scores(
        q_TIJ, k_SJ[:0], gate_TI, torch.full((NUM_QUERIES, 2), -1)
    )
    assert no_keys_TK.isneginf().all(), "a row without keys at all"


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (33, 100, 3, 12), (5, 130, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_eager_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, fill_new_with_nan: None
) -> None:
    num_queries, num_keys, heads, channels = shape
    inputs = (
        make_tensor(num_queries, heads, channels, seed=1, dtype=dtype),
        make_tensor(num_keys, channels, seed=2, dtype=dtype),
        make_tensor(num_queries, heads, seed=3, dtype=dtype),
    )
    selection_TK = odd_selection(num_queries, num_keys, 17, 5)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert_triton_equals_eager(inputs, selection_TK, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_eager_in_float64_at_the_models_size(dtype: torch.dtype) -> None:
    inputs = (
        make_tensor(515, 16, 64, seed=1, dtype=dtype),
        make_tensor(8195, 64, seed=2, dtype=dtype),
        make_tensor(515, 16, seed=3, dtype=dtype),
    )
    selection_TK = make_selection("uniform", 515, 8195, 2048, seed=4)
    # Of 17 million products a few lie so close to 0 that relu's kink falls to the other side.
    tolerance = 1e-3 if dtype == torch.float32 else 2.0**-7
    assert_triton_equals_eager(inputs, selection_TK, tolerance)


def assert_triton_equals_eager(
    inputs: tuple[Tensor, Tensor, Tensor], indices_TK: Tensor, tolerance: float
) -> None:
    """Compare scores and gradients with float64."""
    inputs = moved(inputs, "triton")
    (indices_TK,) = moved((indices_TK,), "triton")
    exact = trainable(tuple(tensor.double() for tensor in inputs))
    inputs = trainable(inputs)
    scores_TK = selected_indexer_scores(*inputs, indices_TK, impl="triton")
    expected_TK = selected_indexer_scores(*exact, indices_TK, impl="eager")
    assert_close(scores_TK, expected_TK, 2e-5)
    for actual, expected in zip(
        gradients(scores_TK, *inputs), gradients(expected_TK, *exact), strict=True
    ):
        assert_norm_close(actual, expected, tolerance)


def test_a_misfit_is_named() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    with pytest.raises(ValueError, match="indices_TK: got torch.float64"):
        selected_indexer_scores(q_TIJ, k_SJ, gate_TI, q_TIJ[:, 0])
