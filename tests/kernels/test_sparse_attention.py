# SPDX-License-Identifier: Apache-2.0
"""Tests of the attention over selected keys and of the target that it hands out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels import row_chunks
from megatron_keye.kernels.dense_attention import dense_attention
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.select_top_k import select_top_k
from megatron_keye.kernels.sparse_attention import sparse_attention
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    device,
    document_ranges,
    gradients,
    listed,
    loop_attention,
    make_selection,
    make_tensor,
    moved,
    odd_selection,
    trainable,
)

NUM_QUERIES, NUM_KEYS, NUM_GROUPS, NUM_HEADS, NUM_CHANNELS, K = 63, 100, 2, 6, 10, 17
SCALE = 0.3


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_THC, k_SGC and v_SGC."""
    return (
        make_tensor(NUM_QUERIES, NUM_HEADS, NUM_CHANNELS, seed=1, dtype=dtype),
        make_tensor(NUM_KEYS, NUM_GROUPS, NUM_CHANNELS, seed=2, dtype=dtype),
        make_tensor(NUM_KEYS, NUM_GROUPS, NUM_CHANNELS, seed=3, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [
        ("eager", torch.float64, 1e-12),
        ("eager", torch.float32, 1e-5),
        ("eager", torch.bfloat16, 1e-2),
        ("triton", torch.float32, 1e-5),
        ("triton", torch.bfloat16, 2e-2),
    ],
)
def test_output_and_target_equal_loops(impl: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs, indices_TK = make_inputs(dtype), odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=4)
    on_device = moved((*inputs, indices_TK), impl)
    out_THC, target_TGK = sparse_attention(*on_device, scale=SCALE, impl=impl)
    out, target = loop_attention(*inputs, listed(indices_TK), SCALE)
    assert out_THC.dtype == dtype, "output type"
    assert target_TGK.dtype == torch.promote_types(dtype, torch.float32), "target type"
    assert_close(out_THC, out, tolerance)
    index_TGK = indices_TK.long().clamp(min=0)[:, None].expand(-1, NUM_GROUPS, -1)
    expected_TGK = torch.from_numpy(target).gather(2, index_TGK)
    expected_TGK = expected_TGK.masked_fill((indices_TK < 0)[:, None], 0)
    assert_close(target_TGK, expected_TGK, min(tolerance, 1e-5))
    has_keys_T = (indices_TK >= 0).any(dim=1)
    assert_close(target_TGK.sum(2), has_keys_T[:, None].expand(-1, NUM_GROUPS).double(), 1e-5)


def test_gradients_equal_finite_differences() -> None:
    shapes = [(5, 6, 3), (7, 2, 3), (7, 2, 3)]
    inputs = [make_tensor(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    indices_TK = odd_selection(5, 7, 4, seed=5)

    def output(q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor) -> Tensor:
        return sparse_attention(q_THC, k_SGC, v_SGC, indices_TK, scale=SCALE)[0]

    assert torch.autograd.gradcheck(output, inputs, fast_mode=True), "sparse attention"


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_selecting_everything_equals_dense_attention(impl: str) -> None:
    dtype, tolerance = (torch.float64, 1e-12) if impl == "eager" else (torch.float32, 2e-5)
    inputs = trainable(moved(make_inputs(dtype), impl))
    exact = trainable(make_inputs())
    ranges = document_ranges(20, 43)
    any_scores_TS = make_tensor(NUM_QUERIES, NUM_KEYS, seed=6)
    (indices_TK,) = moved((select_top_k(any_scores_TS, *ranges, NUM_KEYS),), impl)
    out_THC, _ = sparse_attention(*inputs, indices_TK, scale=SCALE, impl=impl)
    dense_THC = dense_attention(*exact, *ranges, scale=SCALE)
    assert_close(out_THC, dense_THC, tolerance)
    for actual, expected in zip(
        gradients(out_THC, *inputs), gradients(dense_THC, *exact), strict=True
    ):
        assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_keys_not_selected_are_never_loaded(impl: str) -> None:
    q_THC, k_SGC, v_SGC = make_inputs(torch.float32)
    k_SGC[0] = k_SGC[50:] = v_SGC[0] = v_SGC[50:] = torch.nan
    indices_TK = odd_selection(NUM_QUERIES, 49, K, seed=7)
    indices_TK = torch.where(indices_TK < 0, -1, indices_TK + 1)
    indices_TK[::2, -1] = NUM_KEYS
    inputs = trainable(moved((q_THC, k_SGC, v_SGC), impl))
    (indices_TK,) = moved((indices_TK,), impl)
    out_THC, target_TGK = sparse_attention(*inputs, indices_TK, scale=SCALE, impl=impl)
    assert out_THC.isfinite().all() and target_TGK.isfinite().all(), "finite output"
    for gradient in gradients(out_THC, *inputs):
        assert gradient.isfinite().all(), "finite gradients"
        assert not gradient[0].any(), "neither query 0, without keys, nor key 0 gets a gradient"


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_rows_without_keys_give_zero(impl: str) -> None:
    inputs = trainable(moved(make_inputs(torch.float32), impl))
    indices_TK = torch.full((NUM_QUERIES, K), -1, dtype=torch.int32, device=device(impl))
    with torch.autograd.detect_anomaly(check_nan=True):
        out_THC, target_TGK = sparse_attention(*inputs, indices_TK, scale=SCALE, impl=impl)
        for gradient in gradients(out_THC, *inputs):
            assert not gradient.any(), "zero gradients"
    assert not out_THC.any() and not target_TGK.any(), "zero output and target"


def test_order_and_padding_do_not_matter_and_repeats_count() -> None:
    inputs = make_inputs()
    tidy_TK = torch.tensor([[3, 8, 41, -1]]).expand(NUM_QUERIES, -1)
    untidy_TK = torch.tensor([[-1, 41, 3, -1, 8]]).expand(NUM_QUERIES, -1)
    tidy_THC, _ = sparse_attention(*inputs, tidy_TK, scale=SCALE)
    untidy_THC, _ = sparse_attention(*inputs, untidy_TK, scale=SCALE)
    assert_close(untidy_THC, tidy_THC, 1e-13)
    repeated_TK = torch.tensor([[3, 3, 8]]).expand(NUM_QUERIES, -1)
    repeated_THC, _ = sparse_attention(*inputs, repeated_TK, scale=SCALE)
    out, _ = loop_attention(*inputs, listed(repeated_TK), SCALE)
    assert_close(repeated_THC, out, 1e-12)


def test_results_are_invariant_to_chunks_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    q_THC, k_SGC, v_SGC = trainable(make_inputs())
    indices_TK = odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=8)

    def everything(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out_THC, target_TGK = sparse_attention(q, k, v, indices_TK, scale=SCALE)
        return [out_THC, target_TGK, *gradients(out_THC, q_THC, k_SGC, v_SGC)]

    whole = everything(q_THC, k_SGC, v_SGC)
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 100_000)
    transposed = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (q_THC, k_SGC, v_SGC)]
    for actual, expected in zip(everything(*transposed), whole, strict=True):
        assert_close(actual, expected, 1e-13)


def test_gradients_of_bfloat16_keys_are_summed_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = trainable(make_inputs(torch.bfloat16))
    q_THC, k_SGC, v_SGC = (tensor.detach().double() for tensor in inputs)
    exact = trainable((q_THC, k_SGC, v_SGC))
    indices_TK = torch.arange(8).expand(NUM_QUERIES, -1)
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 1)
    # Ones, since every query then adds to the same few keys and bf16 sums would lose many.
    sparse_attention(*inputs, indices_TK, scale=SCALE)[0].float().sum().backward()
    sparse_attention(*exact, indices_TK, scale=SCALE)[0].sum().backward()
    dv_SGC, exact_dv_SGC = inputs[2].grad, exact[2].grad
    assert dv_SGC is not None and dv_SGC.dtype == torch.bfloat16, "gradient type"
    assert exact_dv_SGC is not None, "gradient of the exact form"
    assert_close(dv_SGC, exact_dv_SGC, 2.0**-8)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_target_carries_no_gradient_and_can_be_left_out(impl: str) -> None:
    inputs = trainable(moved(make_inputs(torch.float32), impl))
    (indices_TK,) = moved((odd_selection(NUM_QUERIES, 9, 4, 9),), impl)
    out_THC, target_TGK = sparse_attention(*inputs, indices_TK, scale=SCALE, impl=impl)
    again_THC, none_TGK = sparse_attention(
        *inputs, indices_TK, scale=SCALE, impl=impl, with_target=False
    )
    assert torch.equal(again_THC, out_THC) and none_TGK.numel() == 0, "without the target"
    assert not target_TGK.requires_grad, "the indexer must not teach the attention"


def test_a_second_call_takes_the_output_of_the_first() -> None:
    inputs = moved(make_inputs(torch.float32), "triton")
    (indices_TK,) = moved((odd_selection(NUM_QUERIES, 9, 4, 9),), "triton")
    options: dict[str, Any] = {"scale": SCALE, "impl": "triton", "deterministic": True}
    plain, again = (trainable(tuple(each.clone() for each in inputs)) for _ in range(2))
    kept = KeptOutputs()
    with torch.no_grad():
        first_THC, _ = sparse_attention(
            *inputs, indices_TK, with_target=False, kept=kept, **options
        )
    kept.begin_second_call()
    got = sparse_attention(*again, indices_TK.clone(), kept=kept, **options)
    expected = sparse_attention(*plain, indices_TK, **options)
    assert got[0].data_ptr() == first_THC.data_ptr(), "computed again"
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    pairs = zip(gradients(got[0], *again), gradients(expected[0], *plain), strict=True)
    assert all(torch.equal(*pair) for pair in pairs), "gradients"


TRITON_SHAPES = [
    # queries, keys, groups, heads, channels, k: odd ones first, then the model's own.
    (1, 1, 1, 1, 1, 1),
    (20, 40, 1, 1, 16, 7),
    (17, 50, 1, 12, 5, 9),
    (9, 33, 2, 16, 128, 12),
]


@pytest.mark.parametrize("shape", TRITON_SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-6)]
)
def test_triton_equals_eager_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, fill_new_with_nan: None
) -> None:
    num_queries, num_keys, groups, heads, channels, k = shape
    inputs = (
        make_tensor(num_queries, heads, channels, seed=1, dtype=dtype),
        make_tensor(num_keys, groups, channels, seed=2, dtype=dtype),
        make_tensor(num_keys, groups, channels, seed=3, dtype=dtype),
    )
    assert_triton_equals_eager(inputs, odd_selection(num_queries, num_keys, k, 4), tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["local", "uniform"])
@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        (torch.float32, 128),
        (torch.bfloat16, 128),
        (torch.float16, 128),
        (torch.bfloat16, 64),
        (torch.bfloat16, 256),
        (torch.float32, 256),
    ],
)
def test_triton_equals_eager_in_float64_at_the_models_size(
    kind: str, dtype: torch.dtype, channels: int
) -> None:
    inputs = (
        make_tensor(515, 32, channels, seed=1, dtype=dtype),
        make_tensor(8195, 4, channels, seed=2, dtype=dtype),
        make_tensor(8195, 4, channels, seed=3, dtype=dtype),
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    assert_triton_equals_eager(inputs, make_selection(kind, 515, 8195, 2048, seed=4), tolerance)


def assert_triton_equals_eager(
    inputs: tuple[Tensor, Tensor, Tensor], indices_TK: Tensor, tolerance: float
) -> None:
    """Compare output, target and gradients by the norm of the error against float64."""
    inputs = trainable(moved(inputs, "triton"))
    (indices_TK,) = moved((indices_TK,), "triton")
    exact = trainable(tuple(tensor.detach().double() for tensor in inputs))
    expected, expected_TGK = sparse_attention(*exact, indices_TK, scale=SCALE, impl="eager")
    # The interpreter is slow: there the two ways of adding take turns.
    both_ways = (False, True) if torch.cuda.is_available() else (inputs[0].dtype != torch.float32,)
    for deterministic in both_ways:
        out_THC, target_TGK = sparse_attention(
            *inputs, indices_TK, scale=SCALE, impl="triton", deterministic=deterministic
        )
        assert_norm_close(out_THC, expected, tolerance)
        assert_close(target_TGK, expected_TGK, 1e-5)
        weights = make_tensor(*out_THC.shape, seed=99).to(out_THC)
        got = torch.autograd.grad(out_THC, inputs, weights)
        wanted = torch.autograd.grad(expected, exact, weights.double(), retain_graph=True)
        for actual, gradient in zip(got, wanted, strict=True):
            assert_norm_close(actual, gradient, tolerance)


def test_deterministic_gradients_are_the_same_bits() -> None:
    q_THC, k_SGC, v_SGC = make_inputs(torch.bfloat16)
    inputs = trainable(moved((q_THC[:20], k_SGC, v_SGC), "triton"))
    (indices_TK,) = moved((odd_selection(20, NUM_KEYS, K, seed=12),), "triton")

    def once() -> tuple[Tensor, ...]:
        out_THC, _ = sparse_attention(
            *inputs, indices_TK, scale=SCALE, impl="triton", deterministic=True
        )
        return gradients(out_THC, *inputs)

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second), "bits"


def test_triton_takes_non_contiguous_inputs() -> None:
    q_THC, k_SGC, v_SGC = make_inputs(torch.float32)
    inputs = moved((q_THC[:20], k_SGC, v_SGC), "triton")
    (indices_TK,) = moved((odd_selection(20, NUM_KEYS, K, seed=13),), "triton")
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in inputs]
    strided_TK = indices_TK.T.contiguous().T
    plain, plain_TGK = sparse_attention(*inputs, indices_TK, scale=SCALE, impl="triton")
    out_THC, target_TGK = sparse_attention(*strided, strided_TK, scale=SCALE, impl="triton")
    assert torch.equal(out_THC, plain) and torch.equal(target_TGK, plain_TGK), "strides"


def test_triton_refuses_what_it_cannot_do() -> None:
    inputs, indices_TK = make_inputs(), odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=14)
    with pytest.raises(ValueError, match="q_THC: got torch.float64, expected float32"):
        sparse_attention(*moved((*inputs, indices_TK), "triton"), scale=SCALE, impl="triton")


def test_a_misfit_is_named() -> None:
    q_THC, k_SGC, v_SGC = make_inputs()
    indices_TK = odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=10)
    with pytest.raises(ValueError, match="got H = 5, expected a multiple of .* G = 2"):
        sparse_attention(q_THC[:, :5], k_SGC, v_SGC, indices_TK, scale=SCALE)
    with pytest.raises(ValueError, match="v_SGC: got S = 99"):
        sparse_attention(q_THC, k_SGC, v_SGC[1:], indices_TK, scale=SCALE)
    with pytest.raises(ValueError, match="indices_TK: got T = 62"):
        sparse_attention(q_THC, k_SGC, v_SGC, indices_TK[1:], scale=SCALE)
