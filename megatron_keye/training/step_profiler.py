# SPDX-License-Identifier: Apache-2.0
"""Runs the profilers that a run asks for around the steps that it names."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_keye.config.check import check
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.estimate.account import rank_works
from megatron_keye.model import KeyeModel
from megatron_keye.plan.step import StepPlan
from megatron_keye.training.module_ranges import module_ranges
from megatron_keye.training.throughput import device_name, peak_tflops

STEP_RANGE = "step"
"""Name of the range that holds a step in its trace."""


class StepProfiler:
    """Profiles the steps of this rank that the run names."""

    def __init__(self, run: RunConfig, model: KeyeModel, rank: int, device: torch.device) -> None:
        """Prepare for all steps.

        Args:
            run: The run; its `training.profiler` says which steps and ranks.
            model: This rank's modules.
            rank: This rank.
            device: Where it computes.

        Raises:
            UserError: When what is asked for needs a GPU and there is none.
        """
        self._run, self._model, self._rank, self._device = run, model, rank, device
        self._settings = settings = run.training.profiler
        self._on_gpu = device.type == "cuda"
        for name in ("memory_steps", "nvtx_steps"):
            steps = getattr(settings, name)
            where = f"training.profiler.{name}"
            check(self._on_gpu or not steps, where, steps, "an empty list on a CPU")

    @contextmanager
    def step(self, number: int, rows: Sequence[PackedRow], plan: StepPlan) -> Iterator[None]:
        """Profile a step inside the context, if it is one of those that are asked for.

        Args:
            number: 0-based number of the step.
            rows: Of the global batch, in the order in which replicas take turns.
            plan: Of the step.
        """
        settings, due = self._settings, number + 1
        if not settings.is_on or not settings.is_for(self._rank):
            yield
            return
        folder = self._run.folder / "profiler" / f"step-{due}"
        stem = folder / f"rank-{self._rank:05d}"
        with ExitStack() as profilers:
            if due in settings.memory_steps:
                profilers.enter_context(_memory_snapshot(stem.with_suffix(".memory.pickle")))
            if due in settings.nvtx_steps:
                profilers.enter_context(_nvtx_ranges())
                profilers.enter_context(module_ranges(self._model))
            if due in settings.trace_steps:
                folder.mkdir(parents=True, exist_ok=True)
                facts = json.dumps(self._facts(rows, plan))
                stem.with_suffix(".json").write_text(facts)
                profilers.enter_context(self._trace(stem.with_suffix(".trace.json.gz")))
                profilers.enter_context(module_ranges(self._model))
            yield

    @contextmanager
    def _trace(self, file: Path) -> Iterator[None]:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
        # Shapes tell the bytes of exchanges, allocations what memory is for.
        with profile(activities=activities, record_shapes=True, profile_memory=True) as trace:
            yield
            if self._on_gpu:
                torch.cuda.synchronize()
        trace.export_chrome_trace(str(file))

    def _facts(self, rows: Sequence[PackedRow], plan: StepPlan) -> dict[str, Any]:
        """Return what a reader of the trace cannot know from it."""
        name = device_name(self._device)
        chunks = plan.chunks_of(self._rank)
        slots = [slot for chunk in chunks for slot in plan.chunks[chunk].pictures]
        patches = [rows[slot.row].pictures[slot.index].num_patches for slot in slots]
        works = rank_works(self._run, [row.sizes for row in rows], self._rank, patches)
        return {
            "rank": self._rank,
            "device": name,
            "peak_tflops": _or_none(peak_tflops(self._run, name)),
            "torch": torch.__version__,
            "megatron_core": version("megatron-core"),
            "works": [asdict(work) for work in works],
            "tokens": sum(row.num_real_tokens for row in rows),
            "documents": [[int(length) for length in row.branches.lengths] for row in rows],
            "state_bytes": _state_bytes(self._model),
        }


def _or_none(value: float) -> float | None:
    """Return a number, or None for NaN, which is no JSON."""
    return None if value != value else value


def _state_bytes(model: KeyeModel) -> dict[str, int]:
    """Return the bytes of this rank's weights and gradient buffers."""
    wrapped = model.wrapped()
    buffers = [b for each in wrapped for b in each.buffers + each.expert_parallel_buffers]
    weights = sum(weight.nbytes for each in wrapped for weight in each.parameters())
    return {"weights": weights, "gradients": sum(each.grad_data.nbytes for each in buffers)}


@contextmanager
def _memory_snapshot(file: Path) -> Iterator[None]:
    """Record all allocations of this GPU inside the context, and write them to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        yield
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def _nvtx_ranges() -> Iterator[None]:
    """Let nsys record the context, with ranges of operators and modules."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        with torch.autograd.profiler.emit_nvtx():
            yield
            torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()
