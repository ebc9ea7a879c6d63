# SPDX-License-Identifier: Apache-2.0
"""One traced step of one rank: modules, kernels, exchanges and memory."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_keye.profiling.communication import ExchangeSum, find_exchanges, sum_exchanges
from megatron_keye.profiling.intervals import Interval, covered, exposed, union
from megatron_keye.profiling.memory import StepMemory, measure_memory
from megatron_keye.profiling.pieces import (
    OPERATORS_OF_TORCH,
    Piece,
    find_pieces,
    place_at,
)
from megatron_keye.profiling.places import Pass, find_places
from megatron_keye.profiling.trace import Trace, read_trace

Key = tuple[str, Pass]
"""Module and pass."""


@dataclass(frozen=True, kw_only=True)
class KernelSum:
    """Launches of one kernel, or calls of one operator, in one module and pass."""

    name: str
    module: str
    in_pass: str
    count: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """What a trace shows of one step on one rank."""

    facts: dict[str, Any]
    """What the rank wrote beside the trace."""
    seconds: float
    """Of the traced step."""
    modules: dict[Key, float]
    """Seconds of each module and pass."""
    kernels: list[KernelSum]
    """The longest first."""
    exchanges: list[ExchangeSum]
    """By kind and module."""
    exposed_seconds: float
    """In which this rank did nothing but exchange."""
    busy_seconds: float
    """In which it computed."""
    memory: StepMemory
    """By kind."""


def read_rank_step(trace_file: Path, step_range: str) -> RankStep:
    """Read a trace and the facts beside it.

    Args:
        trace_file: rank-N.trace.json.gz of a run's profiler/step-N.
        step_range: Name of the range of the step.

    Raises:
        UserError: When the file is no trace of a step.
    """
    facts = json.loads((trace_file.parent / f"{trace_file.name[:10]}.json").read_text())
    return summarize(read_trace(trace_file, step_range), facts)


def summarize(trace: Trace, facts: dict[str, Any]) -> RankStep:
    """Return what a trace shows.

    Args:
        trace: Of one step.
        facts: Written beside it.
    """
    places = find_places(trace)
    at = partial(place_at, trace, places)
    pieces = find_pieces(trace, places)
    exchanges = find_exchanges(trace, at)
    waits = union(exchange.span for exchange in exchanges)
    if not trace.kernels:
        pieces = list(without_waits(pieces, waits))
    computing = [(piece.start, piece.end) for piece in pieces]
    return RankStep(
        facts=facts,
        seconds=trace.step.end - trace.step.start,
        modules=_sums(pieces, lambda piece: (piece.place.module, piece.place.in_pass)),
        kernels=_kernels(pieces),
        exchanges=sum_exchanges(exchanges, computing),
        exposed_seconds=exposed(waits, computing),
        busy_seconds=covered(computing),
        memory=measure_memory(trace, facts["state_bytes"], at),
    )


def without_waits(pieces: Iterable[Piece], waits: Sequence[Interval]) -> Iterable[Piece]:
    """Yield pieces; of those outside torch's operators only the parts in which no exchange runs.

    A rank waits for an exchange in Python, and that is no work of the module around it.

    Args:
        pieces: Of a CPU's thread, ascending.
        waits: When exchanges ran, disjoint and ascending.
    """
    place = 0
    for piece in pieces:
        while place < len(waits) and waits[place][1] <= piece.start:
            place += 1
        if piece.name.startswith(OPERATORS_OF_TORCH):
            yield piece
            continue
        start, index = piece.start, place
        while index < len(waits) and waits[index][0] < piece.end:
            if waits[index][0] > start:
                yield replace(piece, start=start, end=waits[index][0])
            start = max(start, waits[index][1])
            index += 1
        if start < piece.end:
            yield replace(piece, start=start)


def _sums(pieces: Iterable[Piece], key: Callable[[Piece], Key]) -> dict[Key, float]:
    sums: dict[Key, float] = defaultdict(float)
    for piece in pieces:
        sums[key(piece)] += piece.seconds
    return dict(sums)


def _kernels(pieces: Sequence[Piece]) -> list[KernelSum]:
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for piece in pieces:
        groups[piece.name, piece.place.module, piece.place.in_pass].append(piece.seconds)
    sums = [
        KernelSum(name=name, module=module, in_pass=of, count=len(each), seconds=sum(each))
        for (name, module, of), each in groups.items()
    ]
    return sorted(sums, key=lambda kernel: kernel.seconds, reverse=True)
