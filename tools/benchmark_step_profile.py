"""What a GPU did in a step of tools/benchmark_step.py: kernels by name, and how long it worked."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

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


def profile_step(step: Callable[[], object]) -> StepProfile:
    """Run a step under torch's profiler, on a GPU.

    Args:
        step: Runs it once.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    spans, launches, milliseconds = [], defaultdict[str, int](int), defaultdict[str, float](float)
    for event in recorded.events():
        if event.device_type.name != "CUDA":
            continue
        start, end = event.time_range.start, event.time_range.end
        spans.append((start, end))
        launches[event.name] += 1
        milliseconds[event.name] += (end - start) / 1e3
    longest = sorted(milliseconds, key=lambda name: milliseconds[name], reverse=True)
    return StepProfile(
        busy_milliseconds=covered(spans) / 1e3,
        kernels=[
            (name, launches[name], round(milliseconds[name], 3)) for name in longest[:TOP_KERNELS]
        ],
        num_launches=len(spans),
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans, each a start and an end."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
