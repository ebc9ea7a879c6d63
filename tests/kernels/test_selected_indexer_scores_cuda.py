# SPDX-License-Identifier: Apache-2.0
"""The CUDA backward pass of the selected scores gives float64's gradients.

What could go wrong is which warp has which query's heads, where a score's gradient stands in its
row, factors written before their last reader has ended, and additions to the wrong key.
"""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.selected_indexer_scores import cuda, selected_indexer_scores
from megatron_keye.kernels.union_lists import union_lists
from tests.support.numerics import (
    assert_norm_close,
    document_ranges,
    gradients,
    make_selection,
    make_tensor,
    odd_ranges,
    odd_selection,
    trainable,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        missing_reason("selected_indexer_scores_backward") is not None,
        reason="megatron_keye._C is not built, or without this pass",
    ),
]

TOLERANCE = 2.0**-7
"""That of Triton's in bfloat16: gradients of products are rounded to 8 bits."""

Indexer = tuple[Tensor, Tensor, Tensor]


def make_indexer(
    num_queries: int, num_keys: int, gate_dtype: torch.dtype = torch.bfloat16
) -> Indexer:
    """Return q_TIJ, k_SJ and gate_TI on the GPU."""
    return (
        make_tensor(num_queries, 16, 64, seed=1, dtype=torch.bfloat16).cuda(),
        make_tensor(num_keys, 64, seed=2, dtype=torch.bfloat16).cuda(),
        make_tensor(num_queries, 16, seed=3, dtype=gate_dtype).cuda(),
    )


def differentiate(indexer: Indexer, indices_TK: Tensor) -> tuple[Indexer, Tensor]:
    """Return dq_TIJ, dk_SJ and dgate_TI, and the scores' gradient that they belong to."""
    indices_TK = indices_TK.cuda()
    dscores_TK = make_tensor(*indices_TK.shape, seed=9, dtype=torch.float32).cuda()
    lists = union_lists(indices_TK, len(indexer[1]))
    torch.use_deterministic_algorithms(True)  # memory holds NaN before
    try:
        return cuda.score_selected_backward(dscores_TK, *indexer, lists), dscores_TK
    finally:
        torch.use_deterministic_algorithms(False)


def assert_differentiates(indexer: Indexer, indices_TK: Tensor) -> None:
    """Compare with float64, as a whole and query by query or key by key."""
    actual, dscores_TK = differentiate(indexer, indices_TK)
    exact = trainable(tuple(tensor.double() for tensor in indexer))
    scores_TK = selected_indexer_scores(*exact, indices_TK.cuda(), impl="eager")
    is_real_TK = scores_TK.isfinite()
    total = (scores_TK.masked_fill(~is_real_TK, 0) * dscores_TK).sum()
    expected = torch.autograd.grad(total, exact)
    for got, wanted, like in zip(actual, expected, indexer, strict=True):
        assert got.dtype == like.dtype and got.shape == like.shape and got.is_contiguous()
        assert_norm_close(got, wanted, TOLERANCE)
        error = (got.double() - wanted).norm(dim=-1)
        limit = 4 * TOLERANCE * (wanted.norm(dim=-1) + wanted.norm(dim=-1).mean())
        wrong = (~(error <= limit)).nonzero().tolist()
        assert not wrong, f"{len(wrong)} rows differ, such as {wrong[:5]}"
        assert not got[wanted.abs().sum(-1) == 0].any(), "a gradient where there is none"


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "k"),
    # From one key and one tile to unions of many; ends of all kinds inside tiles.
    [(1, 1, 1), (16, 64, 5), (17, 65, 9), (33, 130, 64), (63, 1000, 40), (200, 5000, 333)],
)
@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32])
def test_odd_selections(num_queries: int, num_keys: int, k: int, gate_dtype: torch.dtype) -> None:
    indexer = make_indexer(num_queries, num_keys, gate_dtype)
    assert_differentiates(indexer, odd_selection(num_queries, num_keys, k, seed=4))


@pytest.mark.parametrize("kind", ["local", "uniform"])
def test_the_models_size(kind: str) -> None:
    selection = make_selection(kind, 515, 8195, 2048, seed=4)
    assert_differentiates(make_indexer(515, 8195), selection)


def test_packed_documents() -> None:
    length = sum(lengths := (1, 64, 65, 900, 17))
    scores_TS = make_tensor(length, length, seed=6, dtype=torch.float32)
    indices_TK = select_top_k(scores_TS, *document_ranges(*lengths), 100)
    assert_differentiates(make_indexer(length, length), indices_TK)


def test_a_part_of_the_queries_as_under_context_parallelism() -> None:
    scores_TS = make_tensor(400, 1600, seed=7, dtype=torch.float32)
    indices_TK = select_top_k(scores_TS, *odd_ranges(400, 1600, seed=8), 200)
    assert_differentiates(make_indexer(400, 1600), indices_TK)


def test_some_tiles_without_any_key() -> None:
    indices_TK = odd_selection(100, 400, 90, seed=9)
    indices_TK[:32] = indices_TK[64:80] = indices_TK[97:] = -1
    assert_differentiates(make_indexer(100, 400), indices_TK)


def test_neither_queries_nor_keys_nor_selections() -> None:
    q_TIJ, k_SJ, gate_TI = make_indexer(40, 100)
    none_TK = torch.full((40, 7), -1, dtype=torch.int32)
    none_TK[:16:2, 0], none_TK[16::3, 0] = 100, -5  # also padding
    for indexer, indices_TK in (
        ((q_TIJ, k_SJ, gate_TI), none_TK),
        ((q_TIJ, k_SJ[:0], gate_TI), none_TK),
        ((q_TIJ, k_SJ, gate_TI), none_TK[:, :0]),
        ((q_TIJ[:0], k_SJ, gate_TI[:0]), none_TK[:0]),
    ):
        grads, _ = differentiate(indexer, indices_TK)
        for grad, tensor in zip(grads, indexer, strict=True):
            assert grad.shape == tensor.shape and not grad.any(), "zeros"


def test_keys_not_selected_are_never_loaded() -> None:
    q_TIJ, k_SJ, gate_TI = make_indexer(63, 300)
    k_SJ[0] = k_SJ[150:] = torch.nan
    indices_TK = odd_selection(63, 149, 40, seed=12)
    indices_TK = torch.where(indices_TK < 0, -1, indices_TK + 1)
    grads, _ = differentiate((q_TIJ, k_SJ, gate_TI), indices_TK)
    assert all(grad.isfinite().all() for grad in grads), "finite"


def test_views_of_any_alignment() -> None:
    q_TIJ, k_SJ, gate_TI = make_indexer(40, 300)
    odd = tuple(torch.cat([t[..., :1], t], dim=-1)[..., 1:] for t in (q_TIJ, k_SJ, gate_TI))
    assert_differentiates((odd[0], odd[1], odd[2]), odd_selection(40, 300, 90, seed=13))


def test_only_sums_of_keys_vary_between_calls() -> None:
    indexer = make_indexer(2000, 8000)
    indices_TK = make_selection("uniform", 2000, 8000, 512, seed=14)
    (first_TIJ, first_SJ, first_TI), _ = differentiate(indexer, indices_TK)
    for _ in range(3):
        (dq_TIJ, dk_SJ, dgate_TI), _ = differentiate(indexer, indices_TK)
        assert torch.equal(dq_TIJ, first_TIJ) and torch.equal(dgate_TI, first_TI), "bits"
        assert_norm_close(dk_SJ, first_SJ, TOLERANCE / 2)  # a race is more than rounding


def test_an_indexer_learns_by_it() -> None:
    """Also under torch.compile."""
    inputs = trainable(make_indexer(130, 900))
    indices_TK = odd_selection(130, 900, 120, seed=15).cuda()

    def score(q: Tensor, k: Tensor, gate: Tensor, impl: str = "cuda") -> Tensor:
        scores_TK = selected_indexer_scores(q, k, gate, indices_TK, impl=impl)
        return scores_TK.masked_fill(indices_TK < 0, 0)

    wanted = gradients(score(*inputs, impl="triton"), *inputs)
    torch.compiler.reset()
    for run in (score, torch.compile(score)):
        for got, expected in zip(gradients(run(*inputs), *inputs), wanted, strict=True):
            assert_norm_close(got, expected, TOLERANCE)


def test_refusals_say_what_is_taken() -> None:
    q_TIJ, k_SJ, gate_TI = make_indexer(4, 10)
    indices_TK = odd_selection(4, 10, 3, seed=17).cuda()
    with pytest.raises(ValueError, match=r"got torch.float32, expected torch.bfloat16"):
        selected_indexer_scores(q_TIJ.float(), k_SJ.float(), gate_TI, indices_TK, impl="cuda")
    with pytest.raises(ValueError, match="got I = 8, expected 16"):
        selected_indexer_scores(q_TIJ[:, :8], k_SJ, gate_TI[:, :8], indices_TK, impl="cuda")


def test_the_registration_satisfies_torch() -> None:
    indexer = make_indexer(20, 90)
    indices_TK = odd_selection(20, 90, 30, seed=18).cuda()
    dscores_TK = make_tensor(20, 30, seed=9, dtype=torch.float32).cuda()
    arguments = dscores_TK, *indexer[:2], indexer[2].float(), *union_lists(indices_TK, 90), 0.125
    operator = torch.ops.megatron_keye.selected_indexer_scores_backward.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
