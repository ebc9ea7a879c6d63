# SPDX-License-Identifier: Apache-2.0
"""Tests of the rotary positions: the definition, its gradient, and Triton against it."""

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.rotary import rotate
from tests.support.numerics import assert_close, gradients, make_tensor, moved, trainable

NUM_TOKENS, NUM_HEADS = 37, 3
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative to the largest entry: a unit in the last place, as the interpreter cuts digits off."""


def make_inputs(
    num_channels: int, dtype: torch.dtype = torch.float64, tables: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_THC, cos_TC and sin_TC of random angles."""
    x_THC = make_tensor(NUM_TOKENS, NUM_HEADS, num_channels, seed=1, dtype=dtype)
    angles_TC = (10 * make_tensor(NUM_TOKENS, num_channels // 2, seed=2)).repeat(1, 2)
    return x_THC, angles_TC.cos().to(tables), angles_TC.sin().to(tables)


@pytest.mark.parametrize("num_channels", [2, 10, 72])
def test_a_pair_is_a_complex_number_that_is_rotated(num_channels: int) -> None:
    x_THC, cos_TC, sin_TC = make_inputs(num_channels)
    half = num_channels // 2
    rotated = (
        torch.complex(*x_THC.split(half, dim=-1)) * torch.complex(cos_TC, sin_TC)[:, None, half:]
    )
    expected_THC = torch.cat([rotated.real, rotated.imag], dim=-1)
    assert_close(rotate(x_THC, cos_TC, sin_TC, impl="eager"), expected_THC, 1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_channels", [2, 10, 64, 72, 128])
def test_triton_equals_float64(
    num_channels: int, dtype: torch.dtype, fill_new_with_nan: None
) -> None:
    inputs = make_inputs(num_channels, dtype, torch.float32)
    x_THC, cos_TC, sin_TC = moved(inputs, "triton")
    weight_THC = make_tensor(*x_THC.shape, seed=3, dtype=dtype).to(x_THC.device)
    trainable((x_THC,))
    turned_THC = rotate(x_THC, cos_TC, sin_TC, impl="triton")
    assert turned_THC.dtype == dtype and turned_THC.is_contiguous()
    (gradient_THC,) = gradients((turned_THC * weight_THC).sum(), x_THC)
    exact = trainable(tuple(tensor.detach().double() for tensor in (x_THC, cos_TC, sin_TC)))
    expected_THC = rotate(*exact, impl="eager")
    (expected_gradient_THC,) = gradients((expected_THC * weight_THC.double()).sum(), exact[0])
    for got, expected in (
        (turned_THC, expected_THC),
        (gradient_THC, expected_gradient_THC),
    ):
        bound = TOLERANCE[dtype] * float(expected.abs().max())
        assert float((got.double() - expected).abs().max()) <= bound


def test_views_are_read_where_they_lie() -> None:
    """Heads out of a mixed projection, and tokens far apart."""
    _, cos_TC, sin_TC = make_inputs(16, tables=torch.float32)
    mixed = make_tensor(NUM_TOKENS, 2, NUM_HEADS + 2, 16, seed=4, dtype=torch.float32)
    mixed, cos_TC, sin_TC = moved((mixed, cos_TC, sin_TC), "triton")
    adjacent_tokens = mixed[:, 0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for x_THC in (mixed[:, 1, 1:4], mixed[:, 0, ::2], adjacent_tokens):
        tables = cos_TC, sin_TC
        expected = rotate(x_THC.contiguous(), *tables, impl="eager")
        assert_close(rotate(x_THC, *tables, impl="triton"), expected, 1e-6)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_no_tokens_give_none(impl: str) -> None:
    x_THC, cos_TC, sin_TC = moved(make_inputs(8, torch.float32, torch.float32), impl)
    trainable((x_THC,))
    turned_THC = rotate(x_THC[:0], cos_TC[:0], sin_TC[:0], impl=impl)
    assert turned_THC.shape == (0, NUM_HEADS, 8)
    (gradient_THC,) = gradients(turned_THC.sum(), x_THC)
    assert not gradient_THC.any()


def test_the_widest_type_computes() -> None:
    x_THC, cos_TC, sin_TC = make_inputs(8, torch.bfloat16)
    expected_THC = rotate(x_THC.double(), cos_TC, sin_TC).bfloat16()
    assert torch.equal(rotate(x_THC, cos_TC, sin_TC), expected_THC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cos_TC": torch.ones(5, 8)}, "cos_TC: got T = 5"),
        ({"sin_TC": torch.ones(NUM_TOKENS, 6)}, "sin_TC: got C = 6"),
        (
            {"sin_TC": torch.ones(NUM_TOKENS, 8, dtype=torch.bfloat16)},
            "sin_TC: got torch.bfloat16",
        ),
        ({"x_THC": torch.ones(NUM_TOKENS, 8)}, "x_THC: got shape"),
        ({"impl": "cuda"}, "rotary: got impl = 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    names = ("x_THC", "cos_TC", "sin_TC")
    inputs = dict(zip(names, make_inputs(8, torch.float32, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        rotate(**(inputs | change))


def test_an_odd_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="got C = 7 channels, expected pairs"):
        rotate(torch.ones(4, 2, 7), torch.ones(4, 7), torch.ones(4, 7))
