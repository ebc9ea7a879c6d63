"""Keeps what single layers show, for comparing two models layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_keye.decoder.row import RowMeter
from megatron_keye.model import DecoderChunk


@dataclass
class LayerRecorder(RowMeter):
    """A meter that also keeps the tensors that layers show, detached."""

    shown: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Tensors by name and 1-based layer number."""

    def show(self, name: str, layer_number: int, value: Tensor) -> None:
        """Keep `value`."""
        self.shown.setdefault(name, {})[layer_number] = value.detach()

    def stacked(self, name: str) -> Tensor:
        """Return what all layers showed under `name`, [layers, ...] in layer order."""
        of_layers = self.shown[name]
        return torch.stack([of_layers[number] for number in sorted(of_layers)])

    @contextmanager
    def listening(self, chunk: DecoderChunk) -> Iterator[None]:
        """Record each layer's "hidden" and the "final" hidden states of a whole decoder.

        Args:
            chunk: A chunk that holds all layers; its forward passes inside the context count.
        """
        hooks = [
            layer.register_forward_hook(self._keep("hidden", layer.layer_number))
            for layer in chunk.block.layers
        ]
        hooks.append(chunk.block.register_forward_hook(self._keep("final", 0)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str, number: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
            hidden_SBD: Tensor = output[0] if isinstance(output, tuple) else output
            self.show(name, number, hidden_SBD.squeeze(1))

        return keep
