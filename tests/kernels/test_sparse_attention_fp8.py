# SPDX-License-Identifier: Apache-2.0
"""Tests of the attention over selected keys and values of 8 bits."""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.head_quantization import dequantize_heads, quantize_heads
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.sparse_attention_fp8 import sparse_attention_fp8
from tests.support.numerics import (
    assert_close,
    assert_norm_close,
    device,
    listed,
    loop_attention,
    make_selection,
    make_tensor,
    moved,
    odd_selection,
)

NUM_QUERIES, NUM_KEYS, NUM_GROUPS, NUM_HEADS, NUM_CHANNELS, K = 63, 100, 2, 6, 10, 17
SCALE = 0.3
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_operands(dtype: torch.dtype = torch.float64) -> Operands:
    """Return queries, keys, their scales, values and theirs; scales differ by far."""
    sizes_SG1 = 2 ** make_tensor(NUM_KEYS, NUM_GROUPS, 1, seed=4)
    keys = make_tensor(NUM_KEYS, NUM_GROUPS, NUM_CHANNELS, seed=2) * sizes_SG1
    values = make_tensor(NUM_KEYS, NUM_GROUPS, NUM_CHANNELS, seed=3) * 10 * sizes_SG1.flip(0)
    q_THC = make_tensor(NUM_QUERIES, NUM_HEADS, NUM_CHANNELS, seed=1, dtype=dtype)
    return q_THC, *quantize_heads(keys), *quantize_heads(values)


def widened(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values in float64, by their definition."""
    q_THC, k_SGC, k_scales_SG, v_SGC, v_scales_SG = operands
    return (
        q_THC.double(),
        k_SGC.double() * k_scales_SG.double()[..., None],
        v_SGC.double() * v_scales_SG.double()[..., None],
    )


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [
        ("eager", torch.float64, 1e-12),
        ("eager", torch.float32, 1e-5),
        ("eager", torch.bfloat16, 2.0**-8),
        ("triton", torch.float32, 1e-5),
        ("triton", torch.bfloat16, 2.0**-7),
    ],
)
def test_output_equals_loops_over_what_was_rounded(
    impl: str, dtype: torch.dtype, tolerance: float, fill_new_with_nan: None
) -> None:
    operands, indices_TK = make_operands(dtype), odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=4)
    on_device = moved((*operands, indices_TK), impl)
    out_THC = sparse_attention_fp8(*on_device, scale=SCALE, impl=impl)
    out, _ = loop_attention(*widened(operands), listed(indices_TK), SCALE)
    assert out_THC.dtype == dtype and out_THC.is_contiguous(), "type and layout"
    assert not out_THC[0].any(), "a query without keys gives 0"
    for row, wanted in zip(out_THC, torch.from_numpy(out), strict=True):
        assert_norm_close(row, wanted, tolerance)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_what_is_not_selected_is_never_loaded(impl: str) -> None:
    q_THC, k_SGC, k_scales_SG, v_SGC, v_scales_SG = make_operands(torch.float32)
    indices_TK = odd_selection(NUM_QUERIES, 49, K, seed=7)
    indices_TK = torch.where(indices_TK < 0, -1, indices_TK + 1)
    indices_TK[::2, -1] = NUM_KEYS
    operands = q_THC, k_SGC, k_scales_SG, v_SGC, v_scales_SG
    before_THC = sparse_attention_fp8(
        *moved((*operands, indices_TK), impl), scale=SCALE, impl=impl
    )
    for values_SGC, scales_SG in ((k_SGC, k_scales_SG), (v_SGC, v_scales_SG)):
        values_SGC.view(torch.uint8)[0] = values_SGC.view(torch.uint8)[50:] = 0x7F
        scales_SG[0] = scales_SG[50:] = torch.nan
    after_THC = sparse_attention_fp8(*moved((*operands, indices_TK), impl), scale=SCALE, impl=impl)
    assert before_THC.isfinite().all() and torch.equal(after_THC, before_THC), "the same bits"


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_strides_do_not_matter(impl: str) -> None:
    operands = moved(make_operands(torch.float32), impl)
    (indices_TK,) = moved((odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=8),), impl)
    plain_THC = sparse_attention_fp8(*operands, indices_TK, scale=SCALE, impl=impl)

    def strided(tensor: Tensor) -> Tensor:
        moved = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        return moved.transpose(0, -1).contiguous().transpose(0, -1).view(tensor.dtype)

    # Keys beside their values, as in a cache.
    q_THC, k_SGC, k_scales_SG, v_SGC, v_scales_SG = operands
    both = torch.stack([k_SGC.view(torch.uint8), v_SGC.view(torch.uint8)], dim=1)
    k_SGC, v_SGC = both.view(torch.float8_e4m3fn).unbind(1)
    beside = q_THC, k_SGC, k_scales_SG, v_SGC, v_scales_SG
    for case in (beside, tuple(map(strided, operands[:1])) + beside[1:]):
        out_THC = sparse_attention_fp8(*case, indices_TK, scale=SCALE, impl=impl)
        assert_close(out_THC, plain_THC, 1e-6)
    scales = strided(k_scales_SG), strided(v_scales_SG)
    out_THC = sparse_attention_fp8(
        q_THC, k_SGC, scales[0], v_SGC, scales[1], indices_TK, scale=SCALE, impl=impl
    )
    assert_close(out_THC, plain_THC, 1e-6)


def make_keys(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return 32 queries of 4 heads, and 1024 keys and values of 128 channels, by distribution."""
    q_THC = make_tensor(32, 4, 128, seed=1)
    k_SGC, v_SGC = make_tensor(1024, 1, 128, seed=2), make_tensor(1024, 1, 128, seed=3)
    if kind == "outlier channels":
        gain_C = torch.ones(128, dtype=torch.float64)
        gain_C[[3, 40, 77]] = torch.tensor([12.0, 20.0, 8.0], dtype=torch.float64)
        k_SGC, v_SGC = k_SGC * gain_C, v_SGC * gain_C.roll(11)
        k_SGC = k_SGC / k_SGC.square().mean(-1, keepdim=True).sqrt()
    elif kind == "heavy tails":
        k_SGC, v_SGC = (each.sign() * each.abs() ** 2 for each in (k_SGC, v_SGC))
    return q_THC, k_SGC, v_SGC


@pytest.mark.parametrize("kind", ["normal", "outlier channels", "heavy tails"])
@pytest.mark.parametrize(("sharpness", "limit"), [(1.0, 0.04), (4.0, 0.07)])
def test_the_error_of_rounding_is_as_stated(kind: str, sharpness: float, limit: float) -> None:
    """Against float64 without rounding, on normal numbers and such as keys and values have."""
    q_THC, k_SGC, v_SGC = make_keys(kind)
    scale = sharpness * 128**-0.5 / float(k_SGC.square().mean().sqrt())
    indices_TK = torch.arange(1024).expand(32, -1)
    exact_THC, _ = sparse_attention(q_THC, k_SGC, v_SGC, indices_TK, scale=scale)
    rounded = *quantize_heads(k_SGC), *quantize_heads(v_SGC)
    out_THC = sparse_attention_fp8(q_THC, *rounded, indices_TK, scale=scale)
    error = float((out_THC - exact_THC).norm() / exact_THC.norm())
    assert 0.01 < error < limit, error


def test_queries_that_want_a_gradient_are_refused() -> None:
    q_THC, *rounded = make_operands()
    indices_TK = odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=4)
    with pytest.raises(ValueError, match="q_THC: got queries that want a gradient, expected none"):
        sparse_attention_fp8(q_THC.requires_grad_(), *rounded, indices_TK, scale=SCALE)
    with torch.no_grad():
        assert sparse_attention_fp8(q_THC, *rounded, indices_TK, scale=SCALE).isfinite().all()


def test_a_misfit_is_named() -> None:
    q_THC, k_SGC, k_scales_SG, v_SGC, v_scales_SG = make_operands(torch.float32)
    indices_TK = odd_selection(NUM_QUERIES, NUM_KEYS, K, seed=4)
    rest = v_SGC, v_scales_SG, indices_TK
    with pytest.raises(ValueError, match="k_SGC: got torch.float32, expected float8_e4m3fn"):
        sparse_attention_fp8(q_THC, k_SGC.float(), k_scales_SG, *rest, scale=SCALE)
    with pytest.raises(ValueError, match="k_scales_SG: got S = 99"):
        sparse_attention_fp8(q_THC, k_SGC, k_scales_SG[1:], *rest, scale=SCALE)
    with pytest.raises(ValueError, match="k_scales_SG: got torch.float64, expected float32"):
        sparse_attention_fp8(q_THC, k_SGC, k_scales_SG.double(), *rest, scale=SCALE)
    with pytest.raises(ValueError, match="q_THC: got torch.float16"):
        sparse_attention_fp8(q_THC.half(), k_SGC, k_scales_SG, *rest, scale=SCALE)
    with pytest.raises(ValueError, match="got impl = 'flash', expected one of eager, triton"):
        sparse_attention_fp8(q_THC, k_SGC, k_scales_SG, *rest, scale=SCALE, impl="flash")


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_extension = pytest.mark.skipif(
    missing_reason("sparse_attention_forward") is not None, reason="megatron_keye._C is not built"
)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("impl", ["triton", pytest.param("cuda", marks=needs_extension)])
@pytest.mark.parametrize(("kind", "groups", "channels"), [("local", 4, 128), ("uniform", 2, 64)])
def test_the_models_size(impl: str, kind: str, groups: int, channels: int) -> None:
    q_THC = make_tensor(515, groups * 8, channels, seed=1, dtype=torch.bfloat16).cuda()
    k_SGC = make_tensor(8195, groups, channels, seed=2, dtype=torch.bfloat16).cuda()
    v_SGC = make_tensor(8195, groups, channels, seed=3, dtype=torch.bfloat16).cuda()
    indices_TK = make_selection(kind, 515, 8195, 2048, seed=4).cuda()
    rounded = *quantize_heads(k_SGC), *quantize_heads(v_SGC)
    out_THC = sparse_attention_fp8(q_THC, *rounded, indices_TK, scale=channels**-0.5, impl=impl)
    # "cuda" attends to keys and values that are widened to bfloat16, "triton" to those of 8 bits.
    dtype = torch.bfloat16 if impl == "cuda" else torch.float64
    wide = (dequantize_heads(*rounded[i : i + 2], dtype).double() for i in (0, 2))
    exact_THC, _ = sparse_attention(
        q_THC.double(), *wide, indices_TK, scale=channels**-0.5, impl="eager"
    )
    error_TH = (out_THC.double() - exact_THC).norm(dim=-1)
    assert (error_TH <= 2.0**-7 * exact_THC.norm(dim=-1)).all(), float(error_TH.max())


@pytest.mark.gpu
@on_gpu
def test_the_default_is_that_of_the_sparse_attention() -> None:
    from megatron_keye.kernels.sparse_attention import cuda

    q_THC = make_tensor(40, 16, 128, seed=1, dtype=torch.bfloat16).to(device("triton"))
    keys, scales = quantize_heads(make_tensor(90, 2, 128, seed=2).to(q_THC))
    (indices_TK,) = moved((odd_selection(40, 90, K, seed=3),), "triton")
    operands = q_THC, keys, scales, keys, scales, indices_TK
    expected = "cuda" if cuda.suits(q_THC, keys, SCALE) else "triton"
    out_THC = sparse_attention_fp8(*operands, scale=SCALE)
    wanted_THC = sparse_attention_fp8(*operands, scale=SCALE, impl=expected)
    assert torch.equal(out_THC, wanted_THC), expected
