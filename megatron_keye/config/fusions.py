# SPDX-License-Identifier: Apache-2.0
"""Settings of the decoder's fused kernels; each has a plain form of the same result."""

from dataclasses import dataclass, fields
from typing import Literal

from megatron_keye.config.check import check

Fusion = Literal["auto", "on", "off"]

FUSION: tuple[Fusion, ...] = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class FusionsConfig:
    """Fused kernels of the decoder: "auto" takes one where it can run, "on" refuses to start
    elsewhere, "off" takes the plain form.
    """

    permutation: Fusion = "auto"
    """Tokens to experts and back by Transformer Engine. The plain form adds with atomics on a GPU,
    so that a step does not repeat bit for bit."""
    router: Fusion = "auto"
    """Softmax, top-k and balancing loss of the router by Transformer Engine."""
    swiglu: Fusion = "auto"
    """The experts' gate, product and router weight as one kernel, compiled by torch."""
    norm: Fusion = "auto"
    """RMSNorm by Transformer Engine instead of torch."""
    weight_gradients: Fusion = "auto"
    """Products that add weight gradients to the summed ones in place: by Transformer Engine in its
    linear layers, by NVIDIA's apex in Megatron-Core's own. Grouped products of experts have none:
    their gradients are added afterwards."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            check(value in FUSION, f"training.fusions.{each.name}", value, f"one of {FUSION}")
