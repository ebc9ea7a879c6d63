# SPDX-License-Identifier: Apache-2.0
"""What a GPU did in a step of tools/benchmark_step.py: kernels by name, and how long it worked.

Communication is told apart, since only what nothing else hides costs time.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_keye.profiling.communication import is_exchange_kernel
from megatron_keye.profiling.intervals import covered, exposed

TOP_KERNELS = 25


@dataclass(frozen=True)
class StepProfile:
    """Kernels and copies of one step."""

    busy_milliseconds: float
    """Time in which at least one of them ran."""
    kernels: list[tuple[str, int, float]]
    """Name, number of launches and milliseconds of the TOP_KERNELS longest, by name."""
    num_launches: int
    """Of all kernels and copies."""
    communication_milliseconds: float
    """Time in which at least one kernel of NCCL ran, waiting for another rank included."""
    exposed_milliseconds: float
    """The part of it in which nothing else ran."""
    milliseconds: float
    """From the first kernel's begin to the last one's end."""

    @property
    def exposed_share(self) -> float:
        """Share of the step in which nothing but NCCL's kernels ran."""
        return self.exposed_milliseconds / self.milliseconds


def profile_step(step: Callable[[], object]) -> StepProfile:
    """Run a step under torch's profiler, on a GPU.

    Args:
        step: Runs it once.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    launches, milliseconds = defaultdict[str, int](int), defaultdict[str, float](float)
    spans: list[tuple[float, float]] = []
    computing: list[tuple[float, float]] = []
    communicating: list[tuple[float, float]] = []
    for event in recorded.events():
        if event.device_type.name != "CUDA":
            continue
        start, end = event.time_range.start, event.time_range.end
        spans.append((start, end))
        (communicating if is_exchange_kernel(event.name) else computing).append((start, end))
        launches[event.name] += 1
        milliseconds[event.name] += (end - start) / 1e3
    longest = sorted(milliseconds, key=lambda name: milliseconds[name], reverse=True)
    return StepProfile(
        busy_milliseconds=covered(spans) / 1e3,
        kernels=[
            (name, launches[name], round(milliseconds[name], 3)) for name in longest[:TOP_KERNELS]
        ],
        num_launches=len(spans),
        communication_milliseconds=covered(communicating) / 1e3,
        exposed_milliseconds=exposed(communicating, computing) / 1e3,
        milliseconds=(max(end for _, end in spans) - min(start for start, _ in spans)) / 1e3,
    )
