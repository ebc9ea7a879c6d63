# SPDX-License-Identifier: Apache-2.0
"""A part of a tensor is drawn as the whole is, and the numbers are normal."""

import math

import pytest
import torch

from megatron_keye.kernels import drawn_normal
from megatron_keye.kernels.drawn_normal import fill_normal

SHAPE = (37, 5, 11)


def drawn(name: str = "a", *, std: float = 1.0, device: str = "cpu") -> torch.Tensor:
    whole = torch.full(SHAPE, math.nan, device=device)
    fill_normal(whole, name, std=std)
    return whole.cpu()


@pytest.mark.parametrize("offset", [(0, 0, 0), (13, 0, 0), (0, 2, 0), (5, 1, 7)])
@pytest.mark.parametrize("at_once", [1, 64, 1 << 20])
def test_a_part_is_what_the_whole_has_there(
    offset: tuple[int, int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn()
    here = tuple(slice(first, None) for first in offset)
    part = torch.full_like(whole[here], math.nan)
    monkeypatch.setattr(drawn_normal, "_DRAWN_AT_ONCE", at_once)
    fill_normal(part, "a", std=1.0, whole_shape=SHAPE, offset=offset)
    assert torch.equal(part, whole[here])


def test_other_names_and_deviations() -> None:
    assert torch.equal(drawn("a", std=0.25), 0.25 * drawn("a"))
    shared = drawn("a").flatten().tolist() + drawn("b").flatten().tolist()
    assert len(set(shared)) > 0.999 * len(shared)


def test_lower_precision_is_rounded_from_float32() -> None:
    rounded = torch.empty(SHAPE, dtype=torch.bfloat16)
    fill_normal(rounded, "a", std=1.0)
    assert torch.equal(rounded, drawn().bfloat16())


def test_the_numbers_are_normal() -> None:
    many = torch.empty(1 << 20)
    fill_normal(many, "a", std=1.0)
    ordered, size = many.double().sort().values, len(many)
    expected = torch.special.ndtr(ordered)
    # Kolmogorov and Smirnov: larger than this in one of 1000 names.
    places = torch.arange(size, dtype=torch.float64) / size
    assert float((expected - places).abs().max()) < 1.95 / math.sqrt(size)
    correlation = (many[1:] * many[:-1]).mean().abs()
    assert correlation < 5 / math.sqrt(size)
    assert 4.5 < many.abs().max() < 6.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_up_to_the_last_bit() -> None:
    on_cpu, on_gpu = drawn(), drawn(device="cuda")
    assert (on_cpu != on_gpu).float().mean() < 1e-3
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=0)
