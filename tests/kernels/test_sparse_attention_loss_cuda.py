# SPDX-License-Identifier: Apache-2.0
"""The CUDA loss beside the sparse attention gives float64's divergences and gradients.

What could go wrong is whose heads a thread adds up, where a key stands in a query's row of the
selection when unions end inside tiles or change from warp to warp, groups that meet in a sum, and
places that are written twice or never.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.sparse_attention import cuda, sparse_attention
from megatron_keye.kernels.sparse_attention_with_loss import sparse_attention_with_loss
from megatron_keye.kernels.sparse_indexer_loss import sparse_indexer_loss
from megatron_keye.kernels.union_lists import union_lists
from tests.kernels.test_sparse_attention_cuda import SCALE, Heads, make_heads
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    document_ranges,
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
        missing_reason("sparse_attention_loss") is not None,
        reason="megatron_keye._C is not built, or without the loss",
    ),
]

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 3e-5
"""Those of Triton's loss: the target is float32 in both."""


def make_scores(indices_TK: Tensor, num_keys: int, height: float = 1.0) -> Tensor:
    """Return float32 scores of the selected keys, -inf at padding."""
    scores_TK = height * make_tensor(*indices_TK.shape, seed=31, dtype=torch.float32).cuda()
    is_real_TK = (indices_TK >= 0) & (indices_TK < num_keys)
    return scores_TK.masked_fill(~is_real_TK.cuda(), -torch.inf)


def compare(
    heads: Heads, indices_TK: Tensor, scores_TK: Tensor, dkl_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return kl_TG and dscores_TK, of memory that held NaN before."""
    from megatron_keye.kernels.sparse_attention_with_loss import cuda as cuda_loss

    lists = union_lists(indices_TK.cuda(), len(heads[1]))
    _, lse_TH = cuda.attend(*heads, lists, scale=scale)
    torch.use_deterministic_algorithms(True)
    try:
        return cuda_loss.compare(*heads[:2], lse_TH, lists, scores_TK, dkl_T, scale=scale)
    finally:
        torch.use_deterministic_algorithms(False)


def assert_compares(
    heads: Heads, indices_TK: Tensor, scale: float = SCALE, height: float = 1.0
) -> None:
    """Compare with float64, entry by entry."""
    indices_TK = indices_TK.cuda()
    scores_TK = make_scores(indices_TK, len(heads[1]), height)
    dkl_T = make_tensor(len(indices_TK), seed=32, dtype=torch.float32).cuda()
    kl_TG, dscores_TK = compare(heads, indices_TK, scores_TK, dkl_T, scale)
    exact = tuple(tensor.double() for tensor in heads)
    _, target_TGK = sparse_attention(*exact, indices_TK, scale=scale, impl="eager")
    exact_TK = scores_TK.double().requires_grad_()
    expected_TG = sparse_indexer_loss(exact_TK, target_TGK, impl="eager")
    dkl_TG = dkl_T.double()[:, None].expand_as(expected_TG)
    (expected_TK,) = torch.autograd.grad(expected_TG, exact_TK, dkl_TG)
    assert kl_TG.dtype == dscores_TK.dtype == torch.float32
    assert kl_TG.is_contiguous() and dscores_TK.is_contiguous()
    assert_close(kl_TG, expected_TG, LOSS_TOLERANCE)
    assert_close(dscores_TK, expected_TK, GRADIENT_TOLERANCE)
    assert not dscores_TK[scores_TK.isneginf()].any(), "padding gets exactly 0"


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("heads", [4, 8, 16])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "k"),
    # From one key and one tile to unions of many; ends of all kinds inside tiles.
    [(1, 1, 1), (16, 64, 5), (17, 65, 9), (33, 130, 64), (63, 1000, 40), (200, 5000, 333)],
)
def test_odd_selections(
    num_queries: int, num_keys: int, k: int, heads: int, channels: int
) -> None:
    inputs = make_heads(num_queries, num_keys, heads=heads, channels=channels)
    assert_compares(inputs, odd_selection(num_queries, num_keys, k, seed=4))


@pytest.mark.parametrize("groups", [1, 3, 4, 5, 9])
def test_more_groups_than_fit_at_once(groups: int) -> None:
    inputs = make_heads(50, 400, groups=groups)
    assert_compares(inputs, odd_selection(50, 400, 90, seed=5))


@pytest.mark.parametrize("kind", ["local", "uniform"])
@pytest.mark.parametrize("heads", [4, 8, 16])
def test_the_models_size(kind: str, heads: int) -> None:
    inputs = make_heads(515, 8195, groups=4, heads=heads)
    assert_compares(inputs, make_selection(kind, 515, 8195, 2048, seed=4), scale=128**-0.5)


@pytest.mark.parametrize("lengths", [(700, 1001, 3), (1, 64, 65, 900, 17), (30,) * 40])
def test_packed_documents(lengths: tuple[int, ...]) -> None:
    length = sum(lengths)
    scores_TS = make_tensor(length, length, seed=6, dtype=torch.float32)
    indices_TK = select_top_k(scores_TS, *document_ranges(*lengths), 100)
    assert_compares(make_heads(length, length), indices_TK)


def test_a_part_of_the_queries_as_under_context_parallelism() -> None:
    scores_TS = make_tensor(400, 1600, seed=7, dtype=torch.float32)
    indices_TK = select_top_k(scores_TS, *odd_ranges(400, 1600, seed=8), 200)
    assert_compares(make_heads(400, 1600), indices_TK)


@pytest.mark.parametrize("num_keys", [64, 63, 65, 700])
def test_all_keys(num_keys: int) -> None:
    indices_TK = torch.arange(num_keys, dtype=torch.int32).expand(50, -1).contiguous()
    assert_compares(make_heads(50, num_keys), indices_TK)


def test_neither_queries_nor_keys_nor_selections() -> None:
    q_THC, k_SGC, v_SGC = make_heads(40, 100)
    none_TK = torch.full((40, 7), -1, dtype=torch.int32)
    none_TK[:16:2, 0], none_TK[16::3, 0] = 100, -5  # also padding
    for heads, indices_TK in (
        ((q_THC, k_SGC, v_SGC), none_TK),
        ((q_THC, k_SGC[:0], v_SGC[:0]), none_TK),
        ((q_THC, k_SGC, v_SGC), none_TK[:, :0]),
        ((q_THC[:0], k_SGC, v_SGC), none_TK[:0]),
    ):
        scores_TK = make_scores(indices_TK, len(heads[1]))
        dkl_T = torch.ones(len(indices_TK), device="cuda")
        kl_TG, dscores_TK = compare(heads, indices_TK, scores_TK, dkl_T, SCALE)
        assert kl_TG.shape == (len(heads[0]), 2) and not kl_TG.any(), "zeros"
        assert dscores_TK.shape == indices_TK.shape and not dscores_TK.any(), "zeros"


def test_some_tiles_without_any_key() -> None:
    indices_TK = odd_selection(100, 400, 90, seed=9)
    indices_TK[:32] = indices_TK[64:80] = indices_TK[97:] = -1
    assert_compares(make_heads(100, 400), indices_TK)


@pytest.mark.parametrize("height", [1.0, 20.0])
def test_sharp_weights_and_scores(height: float) -> None:
    """Most weight lies on a key or two, and most others' weights and shares are 0."""
    inputs = make_heads(120, 1500)
    assert_compares(inputs, odd_selection(120, 1500, 900, seed=10), scale=1.0, height=height)


def test_weights_of_keys_that_only_neighbours_selected_may_overflow() -> None:
    q_THC, k_SGC, v_SGC = make_heads(48, 300)
    k_SGC[::3] = (k_SGC[::3].float() * 1000).bfloat16()
    indices_TK = odd_selection(48, 300, 90, seed=11)
    indices_TK[1::2] = -1
    indices_TK[1::2, :50] = torch.arange(1, 150, 3, dtype=indices_TK.dtype)
    alone_TK = indices_TK.clone()
    alone_TK[::2] = -1
    dkl_T = torch.ones(48, device="cuda")
    results = []
    for selection in (indices_TK, alone_TK):
        inputs = (q_THC, k_SGC, v_SGC), selection, make_scores(selection, 300)
        results.append(compare(*inputs, dkl_T, 0.3))
    for beside_infinite, alone in zip(*results, strict=True):
        torch.testing.assert_close(beside_infinite[1::2], alone[1::2], atol=1e-5, rtol=1e-5)
    assert_compares((q_THC, k_SGC, v_SGC), alone_TK, scale=0.3)


def test_keys_not_selected_are_never_loaded() -> None:
    q_THC, k_SGC, v_SGC = make_heads(63, 300)
    k_SGC[0] = k_SGC[150:] = torch.nan
    indices_TK = odd_selection(63, 149, 40, seed=12)
    indices_TK = torch.where(indices_TK < 0, -1, indices_TK + 1)
    scores_TK, dkl_T = make_scores(indices_TK, 300), torch.ones(63, device="cuda")
    results = compare((q_THC, k_SGC, v_SGC), indices_TK, scores_TK, dkl_T, SCALE)
    assert all(result.isfinite().all() for result in results), "finite"


def test_views_of_any_alignment() -> None:
    q_THC, k_SGC, v_SGC = make_heads(40, 300)
    indices_TK = odd_selection(40, 300, 90, seed=13)
    odd = tuple(torch.cat([t[..., :1], t], dim=2)[..., 1:] for t in (q_THC, k_SGC, v_SGC))
    assert_compares((odd[0], odd[1], odd[2]), indices_TK)
    both_SGC = torch.cat([k_SGC, v_SGC], dim=1)  # as one projection gives them
    wide_THC = torch.cat([q_THC, q_THC], dim=1)[:, 16:]
    assert_compares((wide_THC, both_SGC[:, :2], both_SGC[:, 2:]), indices_TK)


def test_calls_give_the_same_bits() -> None:
    inputs = make_heads(2000, 8000, groups=4)
    indices_TK = make_selection("uniform", 2000, 8000, 512, seed=14)
    scores_TK, dkl_T = make_scores(indices_TK, 8000), torch.ones(2000, device="cuda")
    first = compare(inputs, indices_TK, scores_TK, dkl_T, SCALE)
    for _ in range(5):
        again = compare(inputs, indices_TK, scores_TK, dkl_T, SCALE)
        assert all(map(torch.equal, again, first)), "bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_learns_by_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_keye.kernels.sparse_attention_with_loss import cuda as cuda_loss

    inputs = trainable(make_heads(130, 900))
    indices_TK = odd_selection(130, 900, 120, seed=15).cuda()
    scores_TK = make_scores(indices_TK, 900).to(dtype).requires_grad_()
    weight_T = make_tensor(130, seed=33, dtype=torch.float32).cuda()
    results: dict[str, list[Tensor]] = {}
    for loss_impl in ("triton", "cuda"):
        monkeypatch.setattr(cuda_loss, "LOSS", loss_impl)
        reported: list[Tensor] = []
        options: dict[str, Any] = {"scale": SCALE, "impl": "cuda", "deterministic": True}
        out_THC, loss = sparse_attention_with_loss(
            *inputs, indices_TK, scores_TK, weight_T, reported.append, **options
        )
        total = (out_THC.float() * make_tensor(*out_THC.shape, seed=99).cuda()).sum() + 3 * loss
        gradients = torch.autograd.grad(total, (*inputs, scores_TK))
        results[loss_impl] = [*reported, *gradients]
    kl_TG, *dheads, dscores_TK = results["cuda"]
    expected_TG, *expected, expected_TK = results["triton"]
    assert all(map(torch.equal, dheads, expected)), "the attention's own gradients"
    assert dscores_TK.dtype == dtype
    assert_close(kl_TG, expected_TG, LOSS_TOLERANCE)
    assert_norm_close(dscores_TK, expected_TK, 1e-5 if dtype == torch.float32 else 2.0**-8)


def test_the_registration_satisfies_torch() -> None:
    heads = make_heads(20, 90)
    indices_TK = odd_selection(20, 90, 30, seed=18).cuda()
    lists = union_lists(indices_TK, 90)
    _, lse_TH = cuda.attend(*heads, lists, scale=SCALE)
    scores_TK, dkl_T = make_scores(indices_TK, 90), torch.ones(20, device="cuda")
    lse_T = torch.zeros_like(dkl_T)
    arguments = (*heads[:2], lse_TH, *lists, scores_TK, lse_T, dkl_T, scores_TK.clone(), SCALE)
    operator = torch.ops.megatron_keye.sparse_attention_loss.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
