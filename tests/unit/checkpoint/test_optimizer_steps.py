# SPDX-License-Identifier: Apache-2.0
"""A loaded optimizer continues the step count of the saved one, torch's own and fused ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_keye.checkpoint.optimizer_state import set_optimizer_steps


def joint_of(optimizer: torch.optim.Optimizer) -> Any:
    return SimpleNamespace(
        decoder=SimpleNamespace(is_stub_optimizer=False, optimizer=optimizer), vision=None
    )


class Fused(torch.optim.Optimizer):
    """Counts like Transformer Engine's and Apex's: by group, from the first step on."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def test_torch_counts_for_each_weight() -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    set_optimizer_steps(joint_of(optimizer), 7)
    for weight in weights:
        weight.grad = torch.ones(2)
        optimizer.state[weight] |= {name: torch.zeros(2) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.step()
    assert [float(optimizer.state[weight]["step"]) for weight in weights] == [8, 8]


@pytest.mark.parametrize("has_stepped", [False, True])
def test_fused_ones_count_for_each_group(has_stepped: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = Fused([{"params": [weight]}, {"params": []}], {})
    if has_stepped:
        optimizer.step()
    set_optimizer_steps(joint_of(optimizer), 7)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [8, 8]
    assert not optimizer.state[weight], "a fused optimizer expects none"
