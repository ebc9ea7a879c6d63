# SPDX-License-Identifier: Apache-2.0
"""Tests of the indexer's scores over ranges."""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels import row_chunks
from megatron_keye.kernels.indexer_scores import indexer_scores
from tests.support.numerics import (
    assert_close,
    document_ranges,
    gradients,
    loop_scores,
    make_tensor,
    moved,
    odd_ranges,
    trainable,
)

NUM_QUERIES, NUM_KEYS, NUM_HEADS, NUM_CHANNELS = 63, 100, 3, 12


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI."""
    return (
        make_tensor(NUM_QUERIES, NUM_HEADS, NUM_CHANNELS, seed=1, dtype=dtype),
        make_tensor(NUM_KEYS, NUM_CHANNELS, seed=2, dtype=dtype),
        make_tensor(NUM_QUERIES, NUM_HEADS, seed=3, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_scores_equal_loops(dtype: torch.dtype, tolerance: float) -> None:
    inputs, ranges = make_inputs(dtype), odd_ranges(NUM_QUERIES, NUM_KEYS, seed=4)
    scores_TS = indexer_scores(*inputs, *ranges)
    assert scores_TS.dtype == (dtype if dtype == torch.float64 else torch.float32), "score type"
    assert_close(scores_TS, loop_scores(*inputs, *ranges), tolerance)


def test_gradients_equal_finite_differences() -> None:
    inputs = [
        make_tensor(*shape, seed=seed).requires_grad_()
        for seed, shape in enumerate([(5, 2, 4), (6, 4), (5, 2)])
    ]
    start_T, end_T = torch.tensor([0, 2, 3, 0, 6]), torch.tensor([6, 5, 3, 1, 6])

    def scores(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> Tensor:
        scores_TS = indexer_scores(q_TIJ, k_SJ, gate_TI, start_T, end_T)
        return scores_TS[scores_TS.isfinite()]

    assert torch.autograd.gradcheck(scores, inputs, fast_mode=True), "range"


def test_results_are_invariant_to_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = trainable(make_inputs())
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=8)

    def everything() -> list[Tensor]:
        scores_TS = indexer_scores(*inputs, *ranges)
        return [scores_TS, *gradients(scores_TS, *inputs)]

    whole = everything()
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 7 * 3 * NUM_HEADS * NUM_KEYS * 8)
    for chunked, expected in zip(everything(), whole, strict=True):
        assert_close(chunked, expected, 1e-13)


def test_packed_documents_do_not_see_each_other() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    ranges = document_ranges(20, 43)
    scores_TS = indexer_scores(q_TIJ, k_SJ, gate_TI, *ranges)
    alone_TS = indexer_scores(q_TIJ[20:], k_SJ[20:63], gate_TI[20:], *document_ranges(43))
    assert_close(scores_TS[20:, 20:63], alone_TS, 1e-13)
    assert scores_TS[20:, :20].isneginf().all(), "earlier document"
    assert scores_TS[:20, 20:].isneginf().all(), "later document"


def test_non_contiguous_inputs_and_empty_rows() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=10)
    expected_TS = indexer_scores(q_TIJ, k_SJ, gate_TI, *ranges)
    strided = (
        q_TIJ.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        k_SJ.T.contiguous().T,
        gate_TI.T.contiguous().T,
    )
    assert_close(indexer_scores(*strided, *ranges), expected_TS, 1e-13)
    none_T = torch.empty(0, dtype=torch.int64)
    assert indexer_scores(q_TIJ[:0], k_SJ, gate_TI[:0], none_T, none_T).shape == (0, NUM_KEYS), "T"


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
    assert_triton_equals_eager(inputs, odd_ranges(num_queries, num_keys, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_eager_in_float64_at_the_models_size(dtype: torch.dtype) -> None:
    inputs = (
        make_tensor(515, 16, 64, seed=1, dtype=dtype),
        make_tensor(8195, 64, seed=2, dtype=dtype),
        make_tensor(515, 16, seed=3, dtype=dtype),
    )
    assert_triton_equals_eager(inputs, odd_ranges(515, 8195, 5))


def assert_triton_equals_eager(
    inputs: tuple[Tensor, Tensor, Tensor], ranges: tuple[Tensor, Tensor]
) -> None:
    """Compare with float64."""
    inputs, ranges = moved(inputs, "triton"), moved(ranges, "triton")
    exact = trainable(tuple(tensor.double() for tensor in inputs))
    expected_TS = indexer_scores(*exact, *ranges, impl="eager")
    assert_close(indexer_scores(*inputs, *ranges, impl="triton"), expected_TS, 2e-5)


def test_triton_refuses_gradients() -> None:
    inputs = trainable(moved(make_inputs(torch.float32), "triton"))
    ranges = moved(odd_ranges(NUM_QUERIES, NUM_KEYS, seed=4), "triton")
    with pytest.raises(ValueError, match="require gradients, expected none"):
        indexer_scores(*inputs, *ranges, impl="triton")


def test_a_misfit_is_named() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    start_T, end_T = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=11)
    with pytest.raises(ValueError, match="k_SJ: got J = 5 .* expected J = 12 as in q_TIJ"):
        indexer_scores(q_TIJ, k_SJ[:, :5], gate_TI, start_T, end_T)
    with pytest.raises(ValueError, match="gate_TI: got shape .* expected 2 dimensions"):
        indexer_scores(q_TIJ, k_SJ, gate_TI[0], start_T, end_T)
    with pytest.raises(ValueError, match="k_SJ: got torch.float32, expected torch.float64"):
        indexer_scores(q_TIJ, k_SJ.float(), gate_TI, start_T, end_T)
    with pytest.raises(ValueError, match="key_end_T: got torch.int32"):
        indexer_scores(q_TIJ, k_SJ, gate_TI, start_T, end_T.int())
    with pytest.raises(ValueError, match="key_start_T: got shape"):
        indexer_scores(q_TIJ, k_SJ, gate_TI, start_T[1:], end_T)
    with pytest.raises(ValueError, match="impl = 'fast', expected one of eager"):
        indexer_scores(q_TIJ, k_SJ, gate_TI, start_T, end_T, impl="fast")
