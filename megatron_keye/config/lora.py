# SPDX-License-Identifier: Apache-2.0
"""Settings of low-rank adapters (LoRA), and the names and sizes that follow from them."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from megatron_keye.config.check import check, check_numbers

Target = Literal["attention", "experts", "projector", "vision"]

TARGETS: dict[Target, Literal["vision", "projector", "decoder"]] = {
    "attention": "decoder",
    "experts": "decoder",
    "projector": "projector",
    "vision": "vision",
}
"""Groups of linears that can have adapters, each with its part of the model."""
LORA_A, LORA_B = "lora_a", "lora_b"
"""Names of an adapter's two matrices, beside the weight of its linear."""
_WEIGHTS: dict[Target, str] = {
    "attention": r"decoder\.block\.layers\.self_attention\.linear_\w+\.weight",
    "experts": r"decoder\.block\.layers\.mlp\.experts\.experts\.linear_\w+\.weight",
    "projector": r"vision\.projector\.linear_\d\.weight",
    "vision": r"vision\.encoder\.encoder\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight",
}
"""Names in checkpoints of the weights that a target stands for."""

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside frozen linears: y = W x + alpha / rank * B (A x)."""

    rank: int = 0
    """Rows of A and columns of B. Above 0, the adapters learn instead of the model's weights, of
    which only the indexers still do, in the sparse phase and unless they are in training.frozen.
    0: no adapters. Their learning rate is that of their linear's part of the model
    (training.optimizer.*_rate_multiplier), and A and B have weight decay, as all matrices. For
    experts a multiple of 8 is fastest: grouped products have no others."""
    alpha: float = 32.0
    """The adapters' output is multiplied by alpha / rank."""
    targets: tuple[Target, ...] = ("attention",)
    """Which linears get adapters: "attention" (query, key, value and output projections of the
    decoder), "experts" (gate, up and down projections of each expert), "projector" (both linears)
    and "vision" (attention and MLP of the ViT). Queries, keys and values share one A, as do gate
    and up, since each set is one linear here."""

    def __post_init__(self) -> None:
        check_numbers(self, "training.lora", above_zero="alpha", zero_or_more="rank")
        known = [target for target in self.targets if target in TARGETS]
        is_known = bool(known) and len(known) == len(self.targets)
        check(is_known, "training.lora.targets", self.targets, f"targets out of {(*TARGETS,)}")
        for setting in fields(self):
            check(
                self.is_on or getattr(self, setting.name) == setting.default,
                f"training.lora.{setting.name}",
                getattr(self, setting.name),
                f"{setting.default!r} while training.lora.rank is 0, which means no adapters",
            )

    def check_learns(self, phase: str, frozen: Collection[str]) -> None:
        """Raise a UserError if there are adapters that would never learn.

        Args:
            phase: Phase of the run.
            frozen: Parts of the model that do not learn.
        """
        if not self.is_on:
            return
        check(
            phase != "indexer_warmup",
            "training.lora.rank",
            self.rank,
            '0 with training.phase="indexer_warmup", in which only indexers learn',
        )
        idle = [target for target in self.targets if TARGETS[target] in frozen]
        check(
            not idle,
            "training.lora.targets",
            self.targets,
            f"none of {idle}, whose linears are in a part of training.frozen={list(frozen)}; "
            "remove it from one of the two",
        )

    @property
    def is_on(self) -> bool:
        """Whether there are adapters."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return self.alpha / self.rank

    def is_adapting(self, target: Target) -> bool:
        """Return whether the linears of a target have adapters."""
        return self.is_on and target in self.targets

    def is_same(self, other: "LoraConfig") -> bool:
        """Return whether adapters of another configuration mean the same, in whatever order."""
        mine, theirs = ((c.rank, c.alpha, set(c.targets)) for c in (self, other))
        return mine == theirs

    def adapter_shapes(self, weights: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of all adapters' matrices, by their names in checkpoints.

        Args:
            weights: Shapes of the model's weights there, with layers and experts stacked.
        """
        shapes: dict[str, Shape] = {}
        for name, shape in weights.items():
            if any(self.is_adapting(t) and re.fullmatch(_WEIGHTS[t], name) for t in TARGETS):
                linear, (*stacked, num_outputs, num_inputs) = name.removesuffix("weight"), shape
                shapes[linear + LORA_A] = (*stacked, self.rank, num_inputs)
                shapes[linear + LORA_B] = (*stacked, num_outputs, self.rank)
        return shapes


def is_adapter(name: str) -> bool:
    """Return whether a parameter is one of an adapter's matrices, by its name."""
    return name.rpartition(".")[2].startswith((LORA_A, LORA_B))


def initial_std(num_inputs: int) -> float:
    """Return the standard deviation of a new A; a new B is 0.

    It is that of the uniform distribution that PEFT draws A from, so that rates carry over.
    """
    return 1 / math.sqrt(3 * num_inputs)
