# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside the linears of the ViT and of the projector.

Shape letters: P patches or merged tokens.

Source: Hu et al., arXiv 2106.09685.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_keye.config.lora import LORA_A, LoraConfig, Target, initial_std
from megatron_keye.kernels.drawn_normal import fill_normal
from megatron_keye.vision.tower import VisionTower


class AdaptedLinear(nn.Linear):
    """A linear with its own parameters under their names, plus scale * B (A x)."""

    def __init__(self, linear: nn.Linear, lora: LoraConfig) -> None:
        """Take over the parameters of a linear, and allocate an adapter that is 0.

        Args:
            linear: The linear to replace.
            lora: Rank and scale.
        """
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = lora.scale
        self.lora_a = nn.Parameter(linear.weight.new_empty(lora.rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, lora.rank))

    def forward(self, features_PX: Tensor) -> Tensor:
        """Return [P, outputs] of [P, inputs]."""
        narrow = functional.linear(features_PX, self.lora_a) * self.scale
        return super().forward(features_PX) + functional.linear(narrow, self.lora_b)


@torch.no_grad()
def add_adapters(tower: VisionTower, lora: LoraConfig, *, seed: int) -> None:
    """Give a tower the adapters that a run trains.

    A matrix depends on its name and the seed alone. It is drawn in float32 and then rounded.

    Args:
        tower: The tower; its other parameters stay as they are.
        lora: Which linears have adapters.
        seed: The run's seed.
    """
    halves: dict[Target, nn.Module] = {"vision": tower.encoder, "projector": tower.projector}
    for target, half in halves.items():
        linears = [(n, m) for n, m in half.named_modules() if isinstance(m, nn.Linear)]
        for name, linear in linears if lora.is_adapting(target) else []:
            adapted = AdaptedLinear(linear, lora)
            key, std = f"{seed}/{target}.{name}.{LORA_A}", initial_std(linear.in_features)
            fill_normal(adapted.lora_a, key, std=std)
            half.set_submodule(name, adapted)
