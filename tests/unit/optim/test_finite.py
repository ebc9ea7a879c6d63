# SPDX-License-Identifier: Apache-2.0
"""One bad number is found among many, wherever it is; good ones never raise a false alarm."""

import math

import pytest
import torch
from torch import Tensor

from megatron_keye.optim import finite
from megatron_keye.optim.finite import is_sick

CPU = torch.device("cpu")


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (0,), (17,), (2, 2, 2), ()]
    return [torch.rand(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_numbers_are_healthy(dtype: torch.dtype) -> None:
    large = [torch.full((9,), 1e15, dtype=dtype), torch.zeros(0, dtype=dtype)]
    assert not is_sick(large, CPU, is_square=False)
    assert not is_sick(large, CPU, is_square=True)
    assert not is_sick([torch.full((9,), 1e37, dtype=dtype)], CPU, is_square=True)
    assert not is_sick([], CPU, is_square=True) and not is_sick([], CPU, is_square=False)
    assert is_sick([-large[0]], CPU, is_square=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-30])
def test_one_bad_number_is_found_in_any_place(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "_ROOTS_AT_ONCE", 7)
    for number, tensor in enumerate(tensors()):
        for place in range(tensor.numel()):
            changed = tensors()
            changed[number].view(-1)[place] = value
            assert is_sick(changed, CPU, is_square=True)
            assert is_sick(changed, CPU, is_square=False) == (not math.isfinite(value))
    assert not is_sick(tensors(), CPU, is_square=True)
