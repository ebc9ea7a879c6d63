# SPDX-License-Identifier: Apache-2.0
"""Tests of the rounding of keys and values to 8 bits."""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.head_quantization import dequantize_heads, quantize_heads
from tests.support.numerics import device, make_tensor

LARGEST = 448
"""The largest e4m3 number."""
SMALLEST_NORMAL = 2.0**-6
"""The smallest e4m3 number with all of its digits."""
NUM_HEADS = 61


def make_heads(num_channels: int, dtype: torch.dtype) -> Tensor:
    """Return heads of many sizes, of zeros, of less than the floor, and with one large entry."""
    sizes = torch.logspace(-20, 20, NUM_HEADS, dtype=torch.float64)
    heads = make_tensor(NUM_HEADS, num_channels, seed=1) * sizes[:, None]
    heads[1], heads[2] = 0, 1e-33
    heads[3, 0] = 1000
    return heads.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_largest_entry_fills_the_format_and_others_are_off_by_half_a_step(
    dtype: torch.dtype,
) -> None:
    heads = make_heads(24, dtype)
    values, scales = quantize_heads(heads, impl="eager")
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32, "types"
    peak = heads.double().abs().amax(dim=-1)
    is_large = peak > 1e-30
    assert (values.double().abs().amax(dim=-1) == LARGEST)[is_large].all(), "the largest entry"
    torch.testing.assert_close(
        scales.double()[is_large] * LARGEST, peak[is_large], rtol=1e-6, atol=0
    )
    exact = heads.double()
    error = (values.double() * scales.double()[:, None] - exact).abs()
    # Half a step is 2^-4 of the power of two below a number, and as much of the smallest normal
    # one for all that are smaller.
    floor = SMALLEST_NORMAL * scales.double()[:, None]
    bound = torch.maximum(exact.abs(), floor) * (2.0**-4 + 1e-6)
    assert (error <= bound).all(), float((error / bound).max())
    assert (error > bound / 4).any(), "the bound is near"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_channels", [1, 10, 64, 128])
def test_triton_gives_the_bits_of_eager(
    num_channels: int, dtype: torch.dtype, fill_new_with_nan: None
) -> None:
    heads = make_heads(num_channels, dtype)
    wanted, wanted_scales = quantize_heads(heads, impl="eager")
    values, scales = quantize_heads(heads.to(device("triton")), impl="triton")
    assert torch.equal(scales.cpu(), wanted_scales), "scales"
    assert torch.equal(values.cpu().view(torch.uint8), wanted.view(torch.uint8)), "values"
    for wide in (torch.float32, torch.bfloat16):
        got = dequantize_heads(values, scales, wide, impl="triton")
        expected = dequantize_heads(wanted, wanted_scales, wide, impl="eager")
        assert got.dtype == wide and torch.equal(got.cpu(), expected), wide


def test_what_is_read_is_the_product_rounded_once() -> None:
    values, scales = quantize_heads(make_heads(24, torch.float64))
    exact = values.double() * scales.double()[:, None]
    assert torch.equal(dequantize_heads(values, scales, torch.float64), exact), "float64"
    for dtype in (torch.float32, torch.bfloat16):
        rounded = dequantize_heads(values, scales, dtype)
        assert torch.equal(rounded, exact.float().to(dtype)), dtype


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_strides_and_further_dimensions_do_not_matter(impl: str) -> None:
    heads = make_tensor(5, 3, 10, seed=1, dtype=torch.bfloat16).to(device(impl))
    values, scales = quantize_heads(heads, impl=impl)
    assert values.shape == (5, 3, 10) and scales.shape == (5, 3), "shapes"
    strided = heads.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous(), "the case is about strides"
    again, same_scales = quantize_heads(strided, impl=impl)
    assert again.is_contiguous() and same_scales.is_contiguous(), "layout"
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)), "values"
    assert torch.equal(same_scales, scales), "scales"
    none, no_scales = quantize_heads(heads[:0], impl=impl)
    assert none.shape == (0, 3, 10) and no_scales.shape == (0, 3), "no heads"
    assert dequantize_heads(none, no_scales, torch.bfloat16, impl=impl).shape == (0, 3, 10)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(impl: str, fault: float) -> None:
    heads = make_tensor(2, 16, seed=1, dtype=torch.float32)
    heads[0, 3] = fault
    read = dequantize_heads(*quantize_heads(heads.to(device(impl)), impl=impl), torch.float32)
    assert read[0].isnan().any() and read[1].isfinite().all(), "in its own head"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_bits_of_the_cpu_at_the_models_size() -> None:
    heads = make_tensor(20_001, 4, 128, seed=1, dtype=torch.bfloat16)
    wanted, wanted_scales = quantize_heads(heads)
    expected = dequantize_heads(wanted, wanted_scales, torch.bfloat16)
    for impl in ("eager", "triton"):
        values, scales = quantize_heads(heads.cuda(), impl=impl)
        assert torch.equal(scales.cpu(), wanted_scales), f"{impl}: scales"
        assert torch.equal(values.cpu().view(torch.uint8), wanted.view(torch.uint8)), impl
        read = dequantize_heads(values, scales, torch.bfloat16, impl=impl)
        assert torch.equal(read.cpu(), expected), f"{impl}: read"


def test_a_misfit_is_named() -> None:
    with pytest.raises(ValueError, match="heads: got torch.float16, expected float64 or float32"):
        quantize_heads(torch.zeros(3, 16, dtype=torch.float16))
    with pytest.raises(ValueError, match="heads: got shape .3, 0., expected"):
        quantize_heads(torch.zeros(3, 0))
    values, scales = quantize_heads(torch.zeros(3, 16))
    with pytest.raises(ValueError, match="scales: got shape .2,., expected .3,., one for each"):
        dequantize_heads(values, scales[1:], torch.bfloat16)
    with pytest.raises(ValueError, match="dtype: got torch.float16"):
        dequantize_heads(values, scales, torch.float16)
    with pytest.raises(ValueError, match="values: got torch.float32, expected float8_e4m3fn"):
        dequantize_heads(values.float(), scales, torch.bfloat16)
