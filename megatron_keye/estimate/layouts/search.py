# SPDX-License-Identifier: Apache-2.0
"""Searches the layouts of a run on some GPUs, the fastest first, for those that fit."""

import heapq
from dataclasses import dataclass, replace

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.layouts.choices import (
    choices,
    least_memory,
    least_time,
    needed_bytes,
    optimizers,
    usable_bytes,
)
from megatron_keye.estimate.layouts.grids import grids
from megatron_keye.estimate.prediction.step import Predictor, StepTime


@dataclass(frozen=True)
class Layout:
    """A run with degrees and settings that fit, and its predicted time."""

    run: RunConfig
    """With these degrees and settings."""
    time: StepTime
    """What its step takes."""
    needed_bytes: float
    """Expected memory of the fullest GPU."""


def find_layouts(run: RunConfig, num_gpus: int, predictor: Predictor, most: int) -> list[Layout]:
    """Return the fastest layouts that fit, one for each decoder grid and placement of vision.

    The optimizer's state stays as the run has it, unless nothing fits so.

    Args:
        run: Model, rows and settings; degrees do not count.
        num_gpus: GPUs, all of which are used.
        predictor: Of the step's rows on these GPUs.
        most: Number of layouts.
    """
    parallels = list(grids(run, num_gpus))
    found = _best_first(run, parallels, predictor, most)
    for other in optimizers(run):
        if found:
            break
        found = _best_first(other, parallels, predictor, most)
    return found


def smallest_need(run: RunConfig, num_gpus: int) -> tuple[float, RunConfig] | None:
    """Return the least memory that a GPU would need, with the run that needs it.

    None where no grid has so many ranks.
    """
    best: tuple[float, RunConfig] | None = None
    for one in (run, *optimizers(run)):
        for parallel in grids(one, num_gpus):
            candidate = _with(one, parallel)
            if candidate is None or parallel.decoder.virtual_stages > 1:
                continue
            leanest = least_memory(candidate)
            needed = needed_bytes(leanest)
            if best is None or needed < best[0]:
                best = needed, leanest
    return best


def _with(run: RunConfig, parallel: ParallelConfig) -> RunConfig | None:
    """Return the run with a grid, or None where it does not take it."""
    try:
        return replace(run, parallel=parallel)
    except UserError:
        return None


def _best_first(
    run: RunConfig, parallels: list[ParallelConfig], predictor: Predictor, most: int
) -> list[Layout]:
    """Take candidates in the order of their times, and keep the first that fit."""
    usable = usable_bytes(predictor.machine.memory_gibibytes * 2**30)
    queue: list[tuple[float, int, RunConfig, bool]] = []
    number = 0
    for candidate in filter(None, (_with(run, parallel) for parallel in parallels)):
        # No choice is faster than to recompute nothing, with the largest chunks.
        number += 1
        heapq.heappush(queue, (_least_seconds(candidate, predictor), number, candidate, False))
    found: dict[tuple[object, ...], Layout] = {}
    while queue and len(found) < most:
        _, _, candidate, is_chosen = heapq.heappop(queue)
        key = _kind(candidate.parallel)
        if key in found:
            continue
        if is_chosen:
            needed = needed_bytes(candidate)
            if needed <= usable:
                found[key] = Layout(candidate, predictor.predict(candidate), needed)
        elif needed_bytes(least_memory(candidate)) <= usable:
            for chosen in choices(candidate):
                number += 1
                seconds = predictor.predict(chosen).seconds
                heapq.heappush(queue, (seconds, number, chosen, True))
    return sorted(found.values(), key=lambda layout: layout.time.seconds)


def _least_seconds(run: RunConfig, predictor: Predictor) -> float:
    return predictor.predict(least_time(run)).seconds


def _kind(parallel: ParallelConfig) -> tuple[object, ...]:
    """Return what makes a layout a line of its own."""
    degrees = parallel.decoder
    return (
        *(degrees.tensor, degrees.pipeline, degrees.context, degrees.expert, degrees.data),
        bool(parallel.vision.num_ranks),
    )
