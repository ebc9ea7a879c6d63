# SPDX-License-Identifier: Apache-2.0
"""Runs ticks of answers over tensors that stay where they are, which a GPU replays as one graph.

A tick launches some tens of kernels a layer, each shorter than its launch. A CUDA graph launches
all at once, but always over the same memory: rows and page tables are filled up to powers of two,
and each such shape is captured when it comes for the first time. On a CPU the same tensors are
filled and the tick runs again.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megatron_keye.config.run import RunConfig
from megatron_keye.decoder.grouped_experts import GroupedExpertLayer
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.errors import UserError
from megatron_keye.rollout.new_tokens import NewTokens

RunTick = Callable[[NewTokens], Tensor]
"""Runs one token of each answer and returns the logits [B, V]."""
Pool = Any
"""Memory of graphs as torch names it; None for that of a graph alone."""


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """A tick of one shape."""

    inputs: list[Tensor]
    """What it reads."""
    replay: Callable[[], object]
    """Runs it."""
    logits_BV: Tensor
    """What it writes."""


class ReplayedTicks:
    """Ticks by their shape, which hold for the weights and the cache of their capture."""

    def __init__(self, device: torch.device) -> None:
        """Start without any.

        Args:
            device: Where ticks run.
        """
        self._device = device
        self._captured: dict[tuple[torch.Size, ...], _Captured] = {}
        self._pool = self._new_pool()

    @property
    def num_captured(self) -> int:
        """Shapes that have come so far."""
        return len(self._captured)

    def __call__(self, run_tick: RunTick, tokens: NewTokens) -> Tensor:
        """Run a tick.

        Args:
            run_tick: Runs it; always the same, which on a GPU leaves the host alone.
            tokens: One of each answer.

        Returns:
            Logits [B, V], which hold until the next tick.
        """
        inputs = _tensors(tokens)
        shape = tuple(tensor.shape for tensor in inputs)
        if shape not in self._captured:
            capture = _capture_graph if self._device.type == "cuda" else run_again
            replay, logits_BV = capture(lambda: run_tick(tokens), self._pool)
            self._captured[shape] = _Captured(inputs=inputs, replay=replay, logits_BV=logits_BV)
        tick = self._captured[shape]
        for kept, new in zip(tick.inputs, inputs, strict=True):
            kept.copy_(new)
        tick.replay()
        return tick.logits_BV

    def forget(self) -> None:
        """Forget all: for other weights, or since they hold a cache that is to be given back."""
        self._captured.clear()
        # A pool ends with the last graph in it.
        self._pool = self._new_pool()

    def _new_pool(self) -> Pool:
        """Return memory that all graphs share, since ticks run one after the other."""
        return torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None


def run_again(tick: Callable[[], Tensor], pool: Pool) -> tuple[Callable[[], object], Tensor]:
    """Return what runs a tick again, without a graph, and where its logits come."""
    logits_BV = tick()
    return lambda: logits_BV.copy_(tick()), logits_BV


def _capture_graph(tick: Callable[[], Tensor], pool: Pool) -> tuple[Callable[[], object], Tensor]:
    """Return what replays a tick's graph, and where its logits come."""
    current, other = torch.cuda.current_stream(), torch.cuda.Stream()
    # Kernels are compiled and libraries make their workspaces. The keys that it writes are those
    # that the replay writes.
    other.wait_stream(current)
    with torch.cuda.stream(other):
        tick()
    current.wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    # Threads that read media may allocate meanwhile, which is no part of the tick.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits_BV = tick()
    return graph.replay, logits_BV


def _tensors(tokens: NewTokens) -> list[Tensor]:
    """Return all tensors that differ between ticks, in a fixed order."""
    parts = [
        getattr(holder, field.name)
        for holder in (tokens.batch, tokens.cache)
        for field in fields(holder)
    ]
    return [part for part in parts if isinstance(part, Tensor)]


def check_graphs(run: RunConfig, stage: VirtualStage, device: torch.device) -> None:
    """Check that the kernels of a tick leave the host alone, where graphs are asked for.

    Args:
        run: A run whose grid generates; its degrees are checked where that is made.
        stage: The decoder.
        device: Where it is; on a CPU there is no graph.

    Raises:
        UserError: Naming the settings that decide it.
    """
    if not run.rollout.uses_cuda_graphs or device.type != "cuda":
        return
    layers = stage.block.layers
    wanted = {
        "training.precision=bf16": run.training.precision == "bf16",
        "training.expert_layers=torch": all(
            isinstance(layer.mlp, GroupedExpertLayer) for layer in layers
        ),
        "training.fusions.permutation=on": bool(stage.config.moe_permute_fusion),
    }
    missing = [setting for setting, is_there in wanted.items() if not is_there]
    if missing:
        raise UserError(
            "rollout.uses_cuda_graphs: got True with layers that wait for the host, expected "
            f"{' and '.join(missing)}; set that, or rollout.uses_cuda_graphs=false"
        )
