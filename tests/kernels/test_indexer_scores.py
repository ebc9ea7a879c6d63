"""Tests of the indexer's scores, over ranges and over selections."""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels import row_chunks
from megatron_keye.kernels.indexer_scores import indexer_scores, selected_indexer_scores
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    document_ranges,
    gradients,
    loop_scores,
    make_selection,
    make_tensor,
    moved,
    odd_ranges,
    odd_selection,
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
    start_T, end_T = torch.tensor([0, 2, 3, 0, 6]), torch.tensor([6, 5, 3, 1, 6])
    indices_TK = odd_selection(5, 6, k=4, seed=7)

    def over_range(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> Tensor:
        scores_TS = indexer_scores(q_TIJ, k_SJ, gate_TI, start_T, end_T)
        return scores_TS[scores_TS.isfinite()]

    def over_selection(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> Tensor:
        scores_TK = selected_indexer_scores(q_TIJ, k_SJ, gate_TI, indices_TK)
        return scores_TK[scores_TK.isfinite()]

    assert torch.autograd.gradcheck(over_range, inputs, fast_mode=True), "range"
    assert torch.autograd.gradcheck(over_selection, inputs, fast_mode=True), "selection"


def test_results_are_invariant_to_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = trainable(make_inputs())
    ranges = odd_ranges(NUM_QUERIES, NUM_KEYS, seed=8)
    indices_TK = odd_selection(NUM_QUERIES, NUM_KEYS, k=17, seed=9)

    def everything() -> list[Tensor]:
        scores_TS = indexer_scores(*inputs, *ranges)
        scores_TK = selected_indexer_scores(*inputs, indices_TK)
        outputs = [scores_TS, scores_TK]
        return outputs + [g for output in outputs for g in gradients(output, *inputs)]

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
    ranges = odd_ranges(num_queries, num_keys, 4)
    selection_TK = odd_selection(num_queries, num_keys, 17, 5)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert_triton_equals_eager(inputs, ranges, selection_TK, tolerance)


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
    assert_triton_equals_eager(inputs, odd_ranges(515, 8195, 5), selection_TK, tolerance)


def assert_triton_equals_eager(
    inputs: tuple[Tensor, Tensor, Tensor],
    ranges: tuple[Tensor, Tensor],
    indices_TK: Tensor,
    tolerance: float,
) -> None:
    """Compare both forms and the gradients with float64."""
    inputs, ranges = moved(inputs, "triton"), moved(ranges, "triton")
    (indices_TK,) = moved((indices_TK,), "triton")
    exact = trainable(tuple(tensor.double() for tensor in inputs))
    expected_TS = indexer_scores(*exact, *ranges, impl="eager")
    assert_close(indexer_scores(*inputs, *ranges, impl="triton"), expected_TS, 2e-5)
    inputs = trainable(inputs)
    scores_TK = selected_indexer_scores(*inputs, indices_TK, impl="triton")
    expected_TK = selected_indexer_scores(*exact, indices_TK, impl="eager")
    assert_close(scores_TK, expected_TK, 2e-5)
    for actual, expected in zip(
        gradients(scores_TK, *inputs), gradients(expected_TK, *exact), strict=True
    ):
        assert_norm_close(actual, expected, tolerance)


def test_triton_refuses_gradients_of_the_range_form() -> None:
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
    with pytest.raises(ValueError, match="indices_TK: got torch.float64"):
        selected_indexer_scores(q_TIJ, k_SJ, gate_TI, q_TIJ[:, 0])
