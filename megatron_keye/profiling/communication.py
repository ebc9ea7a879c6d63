# SPDX-License-Identifier: Apache-2.0
"""Exchanges between ranks in a traced step: their bytes, and how much of them nothing hides."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_keye.profiling.intervals import Interval, covered, exposed
from megatron_keye.profiling.places import Place
from megatron_keye.profiling.trace import Trace

_GLOO, _NCCL, _CALLS = "gloo:", "nccl", "c10d::"
_ITEM_BYTES = {
    **dict.fromkeys(("double", "Double", "long int", "Long", "int64"), 8),
    **dict.fromkeys(("float", "Float", "int", "Int"), 4),
    **dict.fromkeys(("c10::BFloat16", "BFloat16", "c10::Half", "Half"), 2),
    **dict.fromkeys(("unsigned char", "Byte", "bool", "Bool", "signed char", "Char"), 1),
}
"""By the names that gloo's ranges and NCCL's kernels have for types."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One collective on this rank."""

    kind: str
    """Such as "all_reduce"."""
    place: Place
    """What it was called in."""
    num_bytes: int
    """The larger of what this rank gave and got; 0 where the trace does not say."""
    span: Interval
    """From its begin to its end on this rank, the wait for others included."""


@dataclass(frozen=True, kw_only=True)
class ExchangeSum:
    """Exchanges of one kind in one module."""

    kind: str
    module: str
    count: int
    num_bytes: int
    seconds: float
    """In which at least one of them ran."""
    exposed_seconds: float
    """The part of it in which this rank computed nothing."""


def is_exchange_kernel(name: str) -> bool:
    """Return whether a GPU's kernel is NCCL's."""
    return name.startswith(_NCCL)


def is_exchange_call(name: str) -> bool:
    """Return whether an operator of the main thread begins an exchange, or waits in it."""
    return name.startswith(_CALLS)


def find_exchanges(trace: Trace, place_at: Callable[[int, float], Place]) -> list[Exchange]:
    """Return the exchanges of a step.

    Args:
        trace: Of the step.
        place_at: Returns the place of what a thread does at a time.
    """
    if trace.kernels:
        return list(_of_nccl(trace, place_at))
    return list(_of_gloo(trace, place_at))


def sum_exchanges(
    exchanges: Sequence[Exchange], computing: Sequence[Interval]
) -> list[ExchangeSum]:
    """Return the sums by kind and module, the longest exposed first.

    Args:
        exchanges: Of a step.
        computing: When this rank computed.
    """
    groups: dict[tuple[str, str], list[Exchange]] = defaultdict(list)
    for exchange in exchanges:
        groups[exchange.kind, exchange.place.module].append(exchange)
    sums = [
        ExchangeSum(
            kind=kind,
            module=module,
            count=len(group),
            num_bytes=sum(each.num_bytes for each in group),
            seconds=covered(each.span for each in group),
            exposed_seconds=exposed([each.span for each in group], computing),
        )
        for (kind, module), group in groups.items()
    ]
    return sorted(sums, key=lambda each: each.exposed_seconds, reverse=True)


def _of_nccl(trace: Trace, place_at: Callable[[int, float], Place]) -> Iterator[Exchange]:
    for kernel in trace.kernels:
        if not is_exchange_kernel(kernel.name):
            continue
        found = kernel.arguments
        items = max(found.get("In msg nelems", 0), found.get("Out msg nelems", 0))
        yield Exchange(
            kind=found.get("Collective name", kernel.name).removeprefix("_"),
            place=place_at(*(kernel.launch or (0, 0.0))),
            num_bytes=items * _ITEM_BYTES.get(found.get("dtype", ""), 0),
            span=(kernel.start, kernel.end),
        )


def _of_gloo(trace: Trace, place_at: Callable[[int, float], Place]) -> Iterator[Exchange]:
    """Yield gloo's exchanges, which run in its own threads from their begin to their end."""
    step = trace.step
    for node in trace.nodes:
        is_inside = step.start <= node.start < step.end
        if not (node.is_range and node.name.startswith(_GLOO) and is_inside):
            continue
        yield Exchange(
            kind=node.name.removeprefix(_GLOO),
            place=place_at(step.thread, node.start),
            num_bytes=_input_bytes(node.arguments),
            span=(node.start, min(node.end, step.end)),
        )


def _input_bytes(arguments: dict[str, Any]) -> int:
    sizes = zip(arguments.get("Input Dims", ()), arguments.get("Input type", ()), strict=False)
    return sum(
        math.prod(shape) * _ITEM_BYTES[kind]
        for shape, kind in sizes
        if kind in _ITEM_BYTES and all(isinstance(length, int) for length in shape)
    )
