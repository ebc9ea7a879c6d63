# SPDX-License-Identifier: Apache-2.0
"""Tests of the attention whose backward pass makes the indexer's target, in parts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.decoder.recomputation import PackedSelection
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.selected_indexer_scores import selected_indexer_scores
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_attention_with_loss import sparse_attention_with_loss
from megatron_keye.kernels.sparse_indexer_loss import sparse_indexer_loss
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    gradients,
    make_selection,
    make_tensor,
    moved,
    odd_selection,
    trainable,
)

SCALE = 0.3
SHAPES = [
    # queries, keys, groups, heads, channels, k: odd ones first.
    (1, 1, 1, 1, 1, 1),
    (20, 40, 1, 1, 16, 7),
    (17, 50, 2, 24, 5, 9),
    (33, 60, 2, 6, 10, 17),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, indices_TK: Tensor) -> Inputs:
    """Return q_THC, k_SGC, v_SGC and scores_TK, -inf at padding."""
    num_queries, num_keys, groups, heads, channels, _ = shape
    wide = torch.promote_types(dtype, torch.float32)
    scores_TK = make_tensor(*indices_TK.shape, seed=4, dtype=wide)
    is_real_TK = (indices_TK >= 0) & (indices_TK < num_keys)
    return (
        make_tensor(num_queries, heads, channels, seed=1, dtype=dtype),
        make_tensor(num_keys, groups, channels, seed=2, dtype=dtype),
        make_tensor(num_keys, groups, channels, seed=3, dtype=dtype),
        scores_TK.masked_fill(~is_real_TK, -torch.inf),
    )


def make_indexer(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI."""
    sizes = [(shape[0], 2, 12), (shape[1], 12), (shape[0], 2)]
    q, k, gate = (make_tensor(*s, seed=i, dtype=torch.float32) for i, s in enumerate(sizes, 6))
    return q, k, gate


def run(
    inputs: Inputs, indices_TK: Tensor, impl: str, **options: Any
) -> tuple[list[Tensor], Tensor, bool]:
    """Return output and gradients, the reported KL, and whether the backward pass reported it."""
    weight_T = make_tensor(len(indices_TK), seed=98).to(indices_TK.device)
    reports: list[Tensor] = []
    out_THC, loss = sparse_attention_with_loss(
        *inputs[:3],
        indices_TK,
        inputs[3],
        weight_T,
        reports.append,
        scale=SCALE,
        impl=impl,
        **options,
    )
    assert loss == 0, "a loss that is not known yet"
    came_late = not reports
    dout_THC = make_tensor(*out_THC.shape, seed=99).to(out_THC)
    learning = [each for each in inputs if each.requires_grad]
    outputs, grads = (out_THC, loss), (dout_THC, 3 * torch.ones_like(loss))
    if not out_THC.requires_grad:
        outputs, grads = outputs[1:], grads[1:]
    found = torch.autograd.grad(outputs, learning, grads)
    assert len(reports) == 1 and not reports[0].requires_grad, "one report"
    return [out_THC, *found], reports[0], came_late


def apart(inputs: Inputs, indices_TK: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the same from the two operators, eagerly."""
    *heads, scores_TK = inputs
    weight_T = make_tensor(len(indices_TK), seed=98).to(indices_TK.device)
    out_THC, target_TGK = sparse_attention(*heads, indices_TK, scale=SCALE, impl="eager")
    kl_TG = sparse_indexer_loss(scores_TK, target_TGK, impl="eager")
    dout_THC = make_tensor(*out_THC.shape, seed=99).to(out_THC)
    total = (out_THC * dout_THC).sum() + 3 * (kl_TG * weight_T[:, None].to(kl_TG)).sum()
    return [out_THC, *torch.autograd.grad(total, inputs)], kl_TG


def assert_equals_the_operators_apart(
    shape: tuple[int, ...], indices_TK: Tensor, impl: str, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = trainable(moved(make_inputs(shape, dtype, indices_TK), impl))
    (indices_TK,) = moved((indices_TK,), impl)
    exact = trainable(tuple(each.detach().double() for each in inputs))
    expected, expected_TG = apart(exact, indices_TK)
    for deterministic in (False, True) if impl == "triton" else (False,):
        got, kl_TG, came_late = run(inputs, indices_TK, impl, deterministic=deterministic)
        assert came_late == (impl == "triton"), "when the KL is known"
        assert_close(kl_TG, expected_TG, min(tolerance, 2e-5))
        for actual, wanted in zip(got[:-1], expected[:-1], strict=True):
            assert_norm_close(actual, wanted, tolerance)
        assert_close(got[-1], expected[-1], min(tolerance, 3e-5))
        assert not got[-1][inputs[3].isneginf()].any(), "padding gets exactly 0"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [
        ("eager", torch.float64, 1e-12),
        ("triton", torch.float32, 1e-5),
        ("triton", torch.bfloat16, 2.0**-6),
    ],
)
def test_one_pass_equals_the_operators_apart(
    shape: tuple[int, ...],
    impl: str,
    dtype: torch.dtype,
    tolerance: float,
    fill_new_with_nan: None,
) -> None:
    num_queries, num_keys, *_, k = shape
    indices_TK = odd_selection(num_queries, num_keys, k, seed=5)
    indices_TK[::2, -1][indices_TK[::2, -1] < 0] = num_keys
    assert_equals_the_operators_apart(shape, indices_TK, impl, dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["local", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_pass_equals_the_operators_apart_at_the_models_size(
    kind: str, dtype: torch.dtype
) -> None:
    shape = 515, 8195, 4, 32, 128, 2048
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    indices_TK = make_selection(kind, 515, 8195, 2048, seed=4)
    assert_equals_the_operators_apart(shape, indices_TK, "triton", dtype, tolerance)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_heads_that_learn_nothing_have_no_backward_pass(impl: str) -> None:
    shape = SHAPES[1]
    indices_TK = odd_selection(*shape[:2], shape[-1], seed=5)
    inputs = moved(make_inputs(shape, torch.float32, indices_TK), impl)
    (indices_TK,) = moved((indices_TK,), impl)
    exact = trainable(tuple(each.double() for each in inputs))
    inputs[3].requires_grad_()
    (out_THC, dscores_TK), kl_TG, came_late = run(inputs, indices_TK, impl)
    expected, expected_TG = apart(exact, indices_TK)
    assert not out_THC.requires_grad and not came_late, "nothing is left for a backward pass"
    assert_close(kl_TG, expected_TG, 2e-5)
    assert_close(dscores_TK, expected[-1], 2e-5)


def test_the_target_never_exists_whole_and_unions_are_merged_once_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_keye.kernels import row_chunks
    from megatron_keye.kernels.sparse_attention_with_loss import autograd as one_pass
    from megatron_keye.kernels.union_lists import triton as union_lists

    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, wrapped)

    counted(one_pass, "attend")
    counted(one_pass, "attend_backward")
    counted(one_pass, "recover_target")
    counted(union_lists, "_merge")
    shape = SHAPES[1]
    num_groups, num_selected = shape[2], shape[-1]
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 8 * num_groups * num_selected * 4)
    indices_TK = odd_selection(*shape[:2], num_selected, seed=5)
    inputs = trainable(moved(make_inputs(shape, torch.float32, indices_TK), "triton"))
    (indices_TK,) = moved((indices_TK,), "triton")
    plain, plain_TG, _ = run(inputs, indices_TK, "triton", deterministic=True)
    indexer = trainable(moved(make_indexer(shape), "triton"))
    gradients(selected_indexer_scores(*indexer, indices_TK, impl="triton"), *indexer)
    of_backward = ["attend_backward", *["recover_target"] * 3]
    assert calls == ["_merge", "attend", *of_backward], "20 queries in parts of 8, one union"
    kept = KeptOutputs()
    with torch.no_grad():
        first_THC, _ = sparse_attention(
            *inputs[:3], indices_TK, scale=SCALE, impl="triton", with_target=False, kept=kept
        )
    kept.begin_second_call()
    calls.clear()
    unpacked_TK = PackedSelection.of(indices_TK, shape[1]).unpack()
    again, again_TG, _ = run(inputs, unpacked_TK, "triton", deterministic=True, kept=kept)
    assert calls == ["_merge", *of_backward], "a recomputed layer merges again, and no more"
    assert again[0].data_ptr() == first_THC.data_ptr(), "the first pass's output"
    pairs = zip([*again, again_TG], [*plain, plain_TG], strict=True)
    assert all(torch.equal(*pair) for pair in pairs), "the same bits"


def test_a_misfit_is_named() -> None:
    indices_TK = odd_selection(20, 40, 7, seed=5)
    *heads, scores_TK = make_inputs(SHAPES[1], torch.float64, indices_TK)
    weight_T = torch.ones(20)
    with pytest.raises(ValueError, match="scores_TK: got K = 6"):
        sparse_attention_with_loss(
            *heads, indices_TK, scores_TK[:, 1:], weight_T, print, scale=SCALE
        )
    with pytest.raises(ValueError, match="weight_T: got T = 19"):
        sparse_attention_with_loss(*heads, indices_TK, scores_TK, weight_T[1:], print, scale=SCALE)
