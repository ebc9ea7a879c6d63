# SPDX-License-Identifier: Apache-2.0
"""A trace of torch's profiler, as its file has it (chrome's format), for one rank and step.

Operators and ranges of a thread nest, and make a tree. A backward operator is linked to the
forward operator that made its node of autograd ("fwdbwd" in the file), a kernel to its launch.
"""

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_keye.errors import UserError

_RANGES, _OPERATORS = "user_annotation", "cpu_op"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_GPU = 1
"""Device type of torch's allocator."""


@dataclass(slots=True, eq=False)
class Node:
    """An operator or a range on one thread."""

    name: str
    """Of the operator or range."""
    is_range: bool
    """Whether the program named it, by record_function."""
    thread: int
    """System's number of the thread."""
    start: float
    """Seconds on the clock of the trace."""
    end: float
    """Likewise."""
    arguments: dict[str, Any]
    """What torch recorded of it."""
    parent: "Node | None" = None
    """What it runs in; None for the thread itself."""
    forward: "Node | None" = None
    """Of a node of autograd: the operator that made it."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel, copy or fill on a GPU."""

    name: str
    start: float
    end: float
    launch: tuple[int, float] | None
    """Thread and time of its launch."""
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory that was taken or, with negative bytes, given back."""

    thread: int
    time: float
    address: int
    num_bytes: int
    total_bytes: int
    """Held by the allocator afterwards."""


@dataclass(frozen=True)
class Trace:
    """One step of one rank."""

    step: Node
    """The range of the step."""
    threads: dict[int, list[Node]]
    """Nodes of each thread by start, a parent before its children."""
    kernels: list[Kernel]
    """Of the GPU; empty on a CPU."""
    allocations: list[Allocation]
    """Of the GPU, on a CPU of main memory, in order."""
    _starts: dict[int, list[float]] = field(default_factory=dict)

    @property
    def nodes(self) -> Iterator[Node]:
        """All nodes by start, so that what a node refers to comes before it."""
        every = [node for nodes in self.threads.values() for node in nodes]
        # Stable, so that a parent stays before a child with the same start.
        return iter(sorted(every, key=lambda node: node.start))

    def node_at(self, thread: int, time: float) -> Node | None:
        """Return the innermost node of a thread at a time; None outside of all."""
        if thread not in self._starts:
            self._starts[thread] = [node.start for node in self.threads.get(thread, [])]
        place = bisect_right(self._starts[thread], time) - 1
        node = self.threads[thread][place] if place >= 0 else None
        while node is not None and node.end < time:
            node = node.parent
        return node


def read_trace(file: Path, step_range: str) -> Trace:
    """Read a trace.

    Args:
        file: A .json.gz of torch's profiler.
        step_range: Name of the range of the step.

    Raises:
        UserError: When it is no such file, or has no such range.
    """
    try:
        with gzip.open(file, "rt") as text:
            events: list[dict[str, Any]] = json.load(text)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: got {type(error).__name__} while reading, expected a trace of torch's "
            "profiler; profile the step again"
        ) from None
    return parse_trace(events, step_range, where=str(file))


def parse_trace(events: list[dict[str, Any]], step_range: str, *, where: str = "trace") -> Trace:
    """Return the trace of a list of events in chrome's format; see `read_trace`."""
    threads = _trees(events)
    nodes = [node for of_thread in threads.values() for node in of_thread]
    steps = [node for node in nodes if node.is_range and node.name == step_range]
    if len(steps) != 1:
        raise UserError(
            f"{where}: got {len(steps)} ranges {step_range!r}, expected one; trace steps with "
            "training.profiler.trace_steps"
        )
    _link(nodes, events)
    kernels = _kernels(events)
    return Trace(steps[0], threads, kernels, _allocations(events, on_gpu=bool(kernels)))


def _trees(events: list[dict[str, Any]]) -> dict[int, list[Node]]:
    threads: dict[int, list[Node]] = defaultdict(list)
    for event in events:
        category = event.get("cat")
        if event["ph"] == "X" and category in (_RANGES, _OPERATORS):
            start, end = event["ts"] * 1e-6, (event["ts"] + event["dur"]) * 1e-6
            threads[event["tid"]].append(
                Node(
                    name=event["name"],
                    is_range=category == _RANGES,
                    thread=event["tid"],
                    start=start,
                    end=end,
                    arguments=event.get("args", {}),
                )
            )
    for nodes in threads.values():
        nodes.sort(key=lambda node: (node.start, -node.end))
        open_nodes: list[Node] = []
        for node in nodes:
            while open_nodes and open_nodes[-1].end <= node.start:
                open_nodes.pop()
            node.parent = open_nodes[-1] if open_nodes else None
            open_nodes.append(node)
    return dict(threads)


def _link(nodes: list[Node], events: list[dict[str, Any]]) -> None:
    """Link the nodes of autograd to their forward operators."""
    flows = [event for event in events if event.get("cat") == "fwdbwd"]
    by_place = {(node.thread, node.start): node for node in nodes if not node.is_range}
    sources = {event["id"]: event for event in flows if event["ph"] == "s"}
    for event in flows:
        source = sources.get(event["id"])
        if event["ph"] != "f" or source is None:
            continue
        backward = by_place.get((event["tid"], event["ts"] * 1e-6))
        forward = by_place.get((source["tid"], source["ts"] * 1e-6))
        if backward is not None:
            backward.forward = forward
            # The engine's own node around it adds up gradients, for the same operator.
            if backward.parent is not None and is_engine(backward.parent):
                backward.parent.forward = forward


def is_engine(node: Node) -> bool:
    """Return whether a node is autograd's evaluation of one of its nodes."""
    return node.name.startswith("autograd::engine::evaluate_function")


def _kernels(events: list[dict[str, Any]]) -> list[Kernel]:
    launches = {
        event["args"]["correlation"]: (event["tid"], event["ts"] * 1e-6)
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    return [
        Kernel(
            name=event["name"],
            start=event["ts"] * 1e-6,
            end=(event["ts"] + event["dur"]) * 1e-6,
            launch=launches.get(event.get("args", {}).get("correlation")),
            arguments=event.get("args", {}),
        )
        for event in events
        if event["ph"] == "X" and event.get("cat") in _KERNELS
    ]


def _allocations(events: list[dict[str, Any]], *, on_gpu: bool) -> list[Allocation]:
    found = []
    for event in events:
        arguments = event.get("args", {})
        if event["name"] != "[memory]" or (arguments["Device Type"] == _GPU) != on_gpu:
            continue
        found.append(
            Allocation(
                thread=event["tid"],
                time=event["ts"] * 1e-6,
                address=arguments["Addr"],
                num_bytes=arguments["Bytes"],
                total_bytes=arguments["Total Allocated"],
            )
        )
    return sorted(found, key=lambda each: each.time)
