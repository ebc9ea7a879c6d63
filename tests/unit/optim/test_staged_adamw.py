# SPDX-License-Identifier: Apache-2.0
"""State that passes through rooms of any size gives the steps of torch's AdamW, to the bit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.config import OptimizerConfig
from megatron_keye.optim.pinned_memory import host_memory
from megatron_keye.optim.staged_adamw import StagedAdamW
from megatron_keye.parallel.cpu import run_megatron_on_cpu

SIZES = ((7, 1, 13), (5,), (64,))
HYPER = ({"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.2, "weight_decay": 0.0})
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


def groups_of(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return groups of weights of other sizes, rates and decays."""
    generator = torch.Generator().manual_seed(3)
    groups = []
    for number, sizes in enumerate(SIZES):
        weights = [torch.randn(s, generator=generator).to(device, dtype) for s in sizes]
        shared = {"betas": (0.9, 0.95), "eps": 1e-6}
        groups.append({"params": weights, **shared, **HYPER[number % 2]})
    return groups


def gradients(groups: list[dict[str, Any]], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    weights = [weight for group in groups for weight in group["params"]]
    return [torch.randn(len(w), generator=generator).to(w.device) for w in weights]


def stepped(
    settings: OptimizerConfig, room_elements: int, device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Return weights and masters after three steps."""
    groups = groups_of(device, dtype)
    optimizer = StagedAdamW(groups, settings, room_elements=room_elements)
    weights = [weight for group in groups for weight in group["params"]]
    for step in range(3):
        for weight, gradient in zip(weights, gradients(groups, step), strict=True):
            weight.decoupled_grad = gradient
        optimizer.step()
    state = [optimizer.state[weight].get("master", weight) for weight in weights]
    assert all(torch.equal(w, s.to(w.device, dtype)) for w, s in zip(weights, state, strict=True))
    return [tensor.cpu() for tensor in state]


def by_torch(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return masters after three steps of torch's own AdamW."""
    groups = groups_of(device, dtype)
    for group in groups:
        group["params"] = [weight.float() for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    weights = [weight for group in groups for weight in group["params"]]
    for step in range(3):
        for weight, gradient in zip(weights, gradients(groups, step), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.cpu() for weight in weights]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [0.3, 1.0])
@pytest.mark.parametrize("room_elements", [1, 6, 13, 1000])
def test_rooms_change_no_step(
    device: str, dtype: torch.dtype, offload: float, room_elements: int
) -> None:
    if device == "cpu":
        run_megatron_on_cpu()
    got = stepped(OptimizerConfig(offload=offload), room_elements, device, dtype)
    expected = by_torch(device, dtype)
    # On a GPU torch takes another kernel, which rounds otherwise.
    limit = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **limit)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_rounded_moments_change_no_step_by_where_they_lie(device: str) -> None:
    if device == "cpu":
        run_megatron_on_cpu()
    here, away = (
        stepped(OptimizerConfig(moments="bf16", offload=share), 6, device, torch.bfloat16)
        for share in (0.0, 1.0)
    )
    exact = by_torch(device, torch.bfloat16)
    for mine, theirs, unrounded in zip(here, away, exact, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, unrounded, rtol=2e-2, atol=2e-2)


def test_host_memory_has_the_shapes_asked_for_and_is_given_back() -> None:
    like = [torch.empty(3, 5), torch.empty(0), torch.empty(7, dtype=torch.bfloat16)]
    tensors = host_memory(like, is_pinned=False)
    assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in like]
    assert not any(tensor.any() for tensor in tensors)
    assert tensors[2].untyped_storage().nbytes() == 14, "torch.save writes whole storages"
    tensors[0].fill_(math.pi)
    assert not tensors[2].any(), "no two share memory"
