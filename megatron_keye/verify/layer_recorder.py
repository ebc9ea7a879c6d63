# SPDX-License-Identifier: Apache-2.0
"""Records tensors of single layers, for comparing two models layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_keye.decoder.row import RowMeter
from megatron_keye.decoder.virtual_stage import VirtualStage


@dataclass
class LayerRecorder(RowMeter):
    """A meter that also records the tensors that layers report, detached."""

    recorded: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Tensors by name and 1-based layer number."""

    def record(self, name: str, layer_number: int, value: Tensor) -> None:
        """Record `value`, detached."""
        self.recorded.setdefault(name, {})[layer_number] = value.detach()

    def stacked(self, name: str) -> Tensor:
        """Return the tensors of all layers under `name`, [layers, ...] in layer order."""
        by_layer = self.recorded[name]
        return torch.stack([by_layer[number] for number in sorted(by_layer)])

    @contextmanager
    def recording(self, stage: VirtualStage) -> Iterator[None]:
        """Record each layer's "hidden" and the "final" hidden states of a whole decoder.

        Args:
            stage: The stage with all layers; its forward passes inside the context are recorded.
        """
        hooks = [
            layer.register_forward_hook(self._hook("hidden", layer.layer_number))
            for layer in stage.block.layers
        ]
        hooks.append(stage.block.register_forward_hook(self._hook("final", 0)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str, number: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def record_output(_: torch.nn.Module, __: Any, output: Any) -> None:
            hidden_SBD: Tensor = output[0] if isinstance(output, tuple) else output
            self.record(name, number, hidden_SBD.squeeze(1))

        return record_output
