# SPDX-License-Identifier: Apache-2.0
"""Settings of the profilers that a run may start in given steps."""

from dataclasses import dataclass

from megatron_keye.config.check import check


@dataclass(frozen=True, kw_only=True)
class ProfilerConfig:
    """Which steps and ranks are profiled, into profiler/ of the run's folder.

    Steps count from 1. The first ones compile kernels and fill caches, and say little.
    """

    trace_steps: tuple[int, ...] = ()
    """Steps that torch's profiler traces, operators and kernels with the module that each belongs
    to, for chrome://tracing, ui.perfetto.dev and megatron-keye profile. They run slower."""
    memory_steps: tuple[int, ...] = ()
    """Steps at whose end a snapshot of the GPU's memory is written, with each allocation of the
    step and where in the code it was made, for pytorch.org/memory_viz. Needs a GPU."""
    nvtx_steps: tuple[int, ...] = ()
    """Steps with NVTX ranges of modules and operators, between cudaProfilerStart and
    cudaProfilerStop, for nsys profile --capture-range=cudaProfilerApi. Needs a GPU."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that do so; an empty list: all. A trace takes some 10 MB for each rank and step."""

    def __post_init__(self) -> None:
        for name in ("trace_steps", "memory_steps", "nvtx_steps"):
            steps: tuple[int, ...] = getattr(self, name)
            where = f"training.profiler.{name}"
            check(all(step > 0 for step in steps), where, steps, "steps of 1 or more")
        is_rank = all(rank >= 0 for rank in self.ranks)
        check(is_rank, "training.profiler.ranks", self.ranks, "ranks of 0 or more")
        both = sorted({*self.trace_steps} & {*self.nvtx_steps})
        check(
            not both,
            "training.profiler.nvtx_steps",
            self.nvtx_steps,
            f"other steps than those of training.profiler.trace_steps, not {both}: torch runs one "
            "of the two at a time",
        )

    @property
    def is_on(self) -> bool:
        """Whether any step is profiled."""
        return bool(self.trace_steps or self.memory_steps or self.nvtx_steps)

    def is_for(self, rank: int) -> bool:
        """Return whether a rank is profiled."""
        return not self.ranks or rank in self.ranks
