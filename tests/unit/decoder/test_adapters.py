# SPDX-License-Identifier: Apache-2.0
"""The adapters of grouped experts act on their own expert's rows, also where it has none."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_keye.config.lora import LoraConfig
from megatron_keye.decoder.adapters import _GroupedAdapter, _subclass
from tests.support.numerics import assert_close, make_tensor

ROWS = [3, 0, 4]


class Grouped(torch.nn.Module):
    """Stands for Transformer Engine's linear of several experts, which needs a GPU."""

    def __init__(
        self, num_experts: int, num_inputs: int, num_outputs: int, **options: Any
    ) -> None:
        super().__init__()
        for expert in range(num_experts):
            weight = torch.nn.Parameter(make_tensor(num_outputs, num_inputs, seed=expert))
            weight.allreduce = False  # type: ignore[attr-defined]
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, hidden: Tensor, rows: list[int]) -> tuple[Tensor, None]:
        parts = hidden.split(rows)
        return torch.cat([p @ getattr(self, f"weight{e}").T for e, p in enumerate(parts)]), None


def test_each_expert_has_an_adapter_of_its_own() -> None:
    lora = LoraConfig(rank=2, alpha=6.0, targets=("experts",))
    groups = SimpleNamespace()
    layer = _subclass(_GroupedAdapter, Grouped, lora)(3, 5, 4, pg_collection=groups)
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        parameter.data = make_tensor(*parameter.shape, seed=10 + number)
        assert parameter.allreduce is False, name
    hidden = make_tensor(sum(ROWS), 5, seed=1).requires_grad_()
    output, _ = layer(hidden, ROWS)
    weights = dict(layer.named_parameters())
    expected = [
        part @ (weights[f"weight{e}"] + 3.0 * weights[f"lora_b{e}"] @ weights[f"lora_a{e}"]).T
        for e, part in enumerate(hidden.split(ROWS))
    ]
    assert_close(output, torch.cat(expected), 1e-12)
    output.sum().backward()
    assert not weights["lora_a1"].grad.any() and weights["lora_a2"].grad.any()
