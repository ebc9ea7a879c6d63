# SPDX-License-Identifier: Apache-2.0
"""The CUDA backward pass of the sparse attention gives float64's gradients, on its own shapes.

What could go wrong is how weights turn from products into factors, sums over the rows of other
warpgroups, shared memory written before its last reader has ended, additions to the wrong key, and
unions that end inside a tile. Both ways in which sums leave are tested: bulk and pairs.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.sparse_attention import cuda, sparse_attention
from megatron_keye.kernels.sparse_attention_with_loss import sparse_attention_with_loss
from megatron_keye.kernels.union_lists import union_lists
from tests.kernels.test_sparse_attention_cuda import SCALE, TOLERANCE, Heads, make_heads
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
        missing_reason("sparse_attention_backward") is not None,
        reason="megatron_keye._C is not built, or without the backward pass",
    ),
    pytest.mark.parametrize("form", ["bulk", "pairs"]),
]


def differentiate(
    heads: Heads, indices_TK: Tensor, form: str, scale: float = SCALE
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return dq_THC, dk_SGC and dv_SGC, and the output's gradient that they belong to."""
    lists = union_lists(indices_TK.cuda(), len(heads[1]))
    out_THC, lse_TH = cuda.attend(*heads, lists, scale=scale)
    dout_THC = make_tensor(*out_THC.shape, seed=99).to(out_THC)
    saved = dout_THC, *heads, out_THC, lse_TH, lists
    return cuda.attend_backward(*saved, scale=scale, in_bulk=form == "bulk"), dout_THC


def assert_differentiates(
    heads: Heads,
    indices_TK: Tensor,
    form: str,
    scale: float = SCALE,
    tolerance: float = 2 * TOLERANCE,
) -> None:
    """Compare with float64, as a whole and key by key or query by query."""
    indices_TK = indices_TK.cuda()
    actual, dout_THC = differentiate(heads, indices_TK, form, scale)
    exact = trainable(tuple(tensor.double() for tensor in heads))
    out_THC, _ = sparse_attention(*exact, indices_TK, scale=scale, impl="eager")
    expected = torch.autograd.grad(out_THC, exact, dout_THC.double())
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == torch.bfloat16 and got.is_contiguous()
        assert_norm_close(got, wanted, tolerance)
        error = (got.double() - wanted).norm(dim=-1)
        limit = 2 * tolerance * (wanted.norm(dim=-1) + wanted.norm(dim=-1).mean())
        wrong = (~(error <= limit)).nonzero().tolist()
        assert not wrong, f"{len(wrong)} rows differ, such as {wrong[:5]}"
    is_key_S = torch.zeros(len(heads[1]) + 1, dtype=torch.bool, device="cuda")
    is_key_S[torch.where(indices_TK < 0, len(heads[1]), indices_TK).long()] = True
    for sums in actual[1:]:
        assert not sums[~is_key_S[:-1]].any(), "a gradient of a key that nobody selected"


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("heads", [4, 8, 16])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "k"),
    # From one key and one tile to unions of many; ends of all kinds inside tiles.
    [(3, 2, 2), (16, 64, 5), (17, 65, 9), (33, 130, 64), (63, 1000, 40), (200, 5000, 333)],
)
def test_odd_selections(
    num_queries: int, num_keys: int, k: int, heads: int, channels: int, form: str
) -> None:
    inputs = make_heads(num_queries, num_keys, heads=heads, channels=channels)
    assert_differentiates(inputs, odd_selection(num_queries, num_keys, k, seed=4), form)


@pytest.mark.parametrize("kind", ["local", "uniform"])
def test_the_models_size(kind: str, form: str) -> None:
    inputs = make_heads(515, 8195, groups=4)
    selection = make_selection(kind, 515, 8195, 2048, seed=4)
    assert_differentiates(inputs, selection, form, scale=128**-0.5)


def test_packed_documents(form: str) -> None:
    length = sum(lengths := (1, 64, 65, 900, 17))
    scores_TS = make_tensor(length, length, seed=6, dtype=torch.float32)
    indices_TK = select_top_k(scores_TS, *document_ranges(*lengths), 100)
    assert_differentiates(make_heads(length, length), indices_TK, form)


def test_a_part_of_the_queries_as_under_context_parallelism(form: str) -> None:
    scores_TS = make_tensor(400, 1600, seed=7, dtype=torch.float32)
    indices_TK = select_top_k(scores_TS, *odd_ranges(400, 1600, seed=8), 200)
    assert_differentiates(make_heads(400, 1600), indices_TK, form)


@pytest.mark.parametrize("num_keys", [64, 63, 65, 700])
def test_all_keys(num_keys: int, form: str) -> None:
    indices_TK = torch.arange(num_keys, dtype=torch.int32).expand(50, -1).contiguous()
    assert_differentiates(make_heads(50, num_keys), indices_TK, form)


def test_neither_queries_nor_keys_nor_selections(form: str) -> None:
    q_THC, k_SGC, v_SGC = make_heads(40, 100)
    none_TK = torch.full((40, 7), -1, dtype=torch.int32)
    none_TK[:16:2, 0], none_TK[16::3, 0] = 100, -5  # also padding
    for heads, indices_TK in (
        ((q_THC, k_SGC, v_SGC), none_TK),
        ((q_THC, k_SGC[:0], v_SGC[:0]), none_TK),
        ((q_THC, k_SGC, v_SGC), none_TK[:, :0]),
        ((q_THC[:0], k_SGC, v_SGC), none_TK[:0]),
    ):
        grads, _ = differentiate(heads, indices_TK, form)
        for grad, tensor in zip(grads, heads, strict=True):
            assert grad.shape == tensor.shape and not grad.any(), "zeros"


def test_some_tiles_without_any_key(form: str) -> None:
    indices_TK = odd_selection(100, 400, 90, seed=9)
    indices_TK[:32] = indices_TK[64:80] = indices_TK[97:] = -1
    assert_differentiates(make_heads(100, 400), indices_TK, form)


def test_sharp_weights(form: str) -> None:
    """Most weight lies on a key or two, whose gradients of logits nearly cancel."""
    inputs = make_heads(120, 1500)
    indices_TK = odd_selection(120, 1500, 900, seed=10)
    assert_differentiates(inputs, indices_TK, form, scale=1.0, tolerance=8 * TOLERANCE)


def test_keys_not_selected_are_never_loaded(form: str) -> None:
    q_THC, k_SGC, v_SGC = make_heads(63, 300)
    k_SGC[0] = k_SGC[150:] = v_SGC[0] = v_SGC[150:] = torch.nan
    indices_TK = odd_selection(63, 149, 40, seed=12)
    indices_TK = torch.where(indices_TK < 0, -1, indices_TK + 1)
    grads, _ = differentiate((q_THC, k_SGC, v_SGC), indices_TK, form)
    assert all(grad.isfinite().all() for grad in grads), "finite"


def test_views_of_any_alignment(form: str) -> None:
    q_THC, k_SGC, v_SGC = make_heads(40, 300)
    indices_TK = odd_selection(40, 300, 90, seed=13)
    odd = tuple(torch.cat([t[..., :1], t], dim=2)[..., 1:] for t in (q_THC, k_SGC, v_SGC))
    assert_differentiates((odd[0], odd[1], odd[2]), indices_TK, form)
    both_SGC = torch.cat([k_SGC, v_SGC], dim=1)  # as one projection gives them
    wide_THC = torch.cat([q_THC, q_THC], dim=1)[:, 16:]
    assert_differentiates((wide_THC, both_SGC[:, :2], both_SGC[:, 2:]), indices_TK, form)


def test_only_sums_of_keys_vary_between_calls(form: str) -> None:
    inputs = make_heads(2000, 8000, groups=4)
    indices_TK = make_selection("uniform", 2000, 8000, 512, seed=14)
    (first_THC, *first), _ = differentiate(inputs, indices_TK, form)
    for _ in range(3):
        (dq_THC, *sums), _ = differentiate(inputs, indices_TK, form)
        assert torch.equal(dq_THC, first_THC), "bits"
        for got, wanted in zip(sums, first, strict=True):
            assert_norm_close(got, wanted, TOLERANCE / 2)  # a race is more than rounding


def test_a_layer_differentiates_by_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under torch.compile; where gradients must be deterministic Triton's pass is taken."""
    inputs = trainable(make_heads(130, 900))
    indices_TK = odd_selection(130, 900, 120, seed=15).cuda()

    def layer(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool = False) -> Tensor:
        options: dict[str, Any] = {"scale": SCALE, "deterministic": deterministic}
        return sparse_attention(q, k, v, indices_TK, impl="cuda", **options)[0]

    wanted = gradients(layer(*inputs), *inputs)
    exact = gradients(layer(*inputs, deterministic=True), *inputs)
    monkeypatch.setattr(cuda, "BACKWARD", form)
    torch.compiler.reset()
    for run in (layer, torch.compile(layer)):
        for got, expected in zip(gradients(run(*inputs), *inputs), wanted, strict=True):
            assert_norm_close(got, expected, 2 * TOLERANCE)
    again = gradients(layer(*inputs, deterministic=True), *inputs)
    assert all(map(torch.equal, again, exact)), "deterministic"


def test_the_attention_with_its_loss_differentiates_by_it(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = trainable(make_heads(130, 900))
    indices_TK = odd_selection(130, 900, 120, seed=16).cuda()
    scores_TK = make_tensor(130, 120, seed=17, dtype=torch.float32).cuda()
    scores_TK = scores_TK.masked_fill(indices_TK < 0, -torch.inf).requires_grad_()
    weight_T = torch.full((130,), 0.01, device="cuda")
    reported: list[Tensor] = []
    results = []
    for backward in ("triton", form):
        monkeypatch.setattr(cuda, "BACKWARD", backward)
        out_THC, loss = sparse_attention_with_loss(
            *inputs, indices_TK, scores_TK, weight_T, reported.append, scale=SCALE, impl="cuda"
        )
        total = (out_THC.float() * make_tensor(*out_THC.shape, seed=99).cuda()).sum() + loss
        results.append(torch.autograd.grad(total, (*inputs, scores_TK)))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_norm_close(got, expected, 2 * TOLERANCE)


def test_the_registration_satisfies_torch(form: str) -> None:
    heads = make_heads(20, 90)
    lists = union_lists(odd_selection(20, 90, 30, seed=18).cuda(), 90)
    out_THC, lse_TH = cuda.attend(*heads, lists, scale=SCALE)
    arguments = (out_THC.clone(), *heads, out_THC, lse_TH, *lists, SCALE, form == "bulk")
    operator = torch.ops.megatron_keye.sparse_attention_backward.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
