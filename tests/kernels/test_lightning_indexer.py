# SPDX-License-Identifier: Apache-2.0
"""Tests of the lightning indexer: scores and top-k in one."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_keye.kernels import row_chunks
from megatron_keye.kernels.indexer_scores import indexer_scores
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from megatron_keye.kernels.select_top_k import select_top_k
from tests.support.numerics import (
    document_ranges,
    loop_scores,
    loop_top_k,
    make_tensor,
    moved,
    odd_ranges,
    trainable,
)

NUM_QUERIES, NUM_KEYS, K = 63, 100, 17


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI."""
    return (
        make_tensor(NUM_QUERIES, 3, 12, seed=1, dtype=dtype),
        make_tensor(NUM_KEYS, 12, seed=2, dtype=dtype),
        make_tensor(NUM_QUERIES, 3, seed=3, dtype=dtype),
    )


def test_selection_equals_loops() -> None:
    inputs, ranges = make_inputs(), odd_ranges(NUM_QUERIES, NUM_KEYS, seed=4)
    expected = loop_top_k(loop_scores(*inputs, *ranges), *ranges, K)
    np.testing.assert_array_equal(lightning_indexer(*inputs, *ranges, K).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_is_bitwise_that_of_the_two_operators(dtype: torch.dtype) -> None:
    inputs, ranges = make_inputs(dtype), document_ranges(20, 43)
    expected_TK = select_top_k(indexer_scores(*inputs, *ranges), *ranges, K)
    indices_TK = lightning_indexer(*inputs, *ranges, K)
    assert torch.equal(indices_TK, expected_TK), "composition"
    assert torch.equal(indices_TK, lightning_indexer(*inputs, *ranges, K)), "repeated call"


def test_dead_gates_select_the_first_keys() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    # relu leaves only 0 and the gate's sign makes it -0.0 for some queries, +0.0 for others.
    indices_TK = lightning_indexer(
        -q_TIJ.abs(), k_SJ.abs(), gate_TI, *document_ranges(NUM_QUERIES), K
    )
    assert indices_TK[-1].tolist() == list(range(K)), "ties to the lower key"
    assert indices_TK[2].tolist() == [0, 1, 2] + [-1] * (K - 3), "fewer keys than k"


def test_selection_is_invariant_to_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, ranges = make_inputs(), odd_ranges(NUM_QUERIES, NUM_KEYS, seed=5)
    expected_TK = lightning_indexer(*inputs, *ranges, K)
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 7 * 3 * 3 * NUM_KEYS * 8)
    assert torch.equal(lightning_indexer(*inputs, *ranges, K), expected_TK), "seven rows per chunk"


def test_selection_carries_no_gradient() -> None:
    inputs = trainable(make_inputs())
    indices_TK = lightning_indexer(*inputs, *document_ranges(NUM_QUERIES), K)
    assert not indices_TK.requires_grad, "indices are integers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_selects_by_its_own_scores_whatever_the_chunk(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_keye.kernels.lightning_indexer import triton

    q_TIJ, k_SJ, gate_TI = make_inputs(dtype)
    inputs = q_TIJ[:20], k_SJ, gate_TI[:20]
    inputs, ranges = moved(inputs, "triton"), moved(odd_ranges(20, NUM_KEYS, seed=4), "triton")
    scores_TS = indexer_scores(*inputs, *ranges, impl="triton")
    expected_TK = select_top_k(scores_TS, *ranges, K, impl="eager")
    assert torch.equal(lightning_indexer(*inputs, *ranges, K, impl="triton"), expected_TK)
    monkeypatch.setattr(triton, "CHUNK_BYTES", 7 * NUM_KEYS * 4)
    monkeypatch.setattr(triton, "_ROW_MULTIPLE", 7)
    chunked_TK = lightning_indexer(*inputs, *ranges, K, impl="triton")
    assert torch.equal(chunked_TK, expected_TK), "seven rows per chunk"


def test_a_misfit_is_named() -> None:
    q_TIJ, k_SJ, gate_TI = make_inputs()
    ranges = document_ranges(NUM_QUERIES)
    with pytest.raises(ValueError, match="k: got -1, expected 1 or more"):
        lightning_indexer(q_TIJ, k_SJ, gate_TI, *ranges, -1)
    with pytest.raises(ValueError, match="gate_TI: got I = 2"):
        lightning_indexer(q_TIJ, k_SJ, gate_TI[:, :2], *ranges, K)


def test_cuda_refuses_what_it_cannot_run() -> None:
    from megatron_keye.kernels.extension import missing_reason

    inputs, ranges = make_inputs(torch.bfloat16), document_ranges(NUM_QUERIES)
    error = ValueError if missing_reason("lightning_indexer") is None else RuntimeError
    with pytest.raises(error, match="lightning_indexer: .*take"):
        lightning_indexer(*inputs, *ranges, K, impl="cuda")
