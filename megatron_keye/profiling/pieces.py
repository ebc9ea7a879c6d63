# SPDX-License-Identifier: Apache-2.0
"""The work of a traced step, cut into pieces that each belong to one module and pass.

On a GPU a piece is a kernel. On a CPU, where operators run when they are called, it is a stretch
of the main thread in which nothing inside its operator or range ran.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_keye.profiling.communication import is_exchange_call, is_exchange_kernel
from megatron_keye.profiling.places import ELSEWHERE, Place
from megatron_keye.profiling.trace import Node, Trace

PYTHON = "python"
"""Name of pieces of ranges: time between operators."""
OPERATORS_OF_TORCH = "aten::"
"""How the names of operators begin that compute; others are functions in Python."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of work."""

    name: str
    """Kernel or operator, or PYTHON."""
    place: Place
    """Module and pass."""
    start: float
    """Seconds on the clock of the trace."""
    end: float
    """Likewise."""

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


def find_pieces(trace: Trace, places: dict[Node, Place]) -> list[Piece]:
    """Return the pieces of a step, without exchanges between ranks."""
    if trace.kernels:
        return list(_of_kernels(trace, places))
    return list(_of_thread(trace, places))


def place_at(trace: Trace, places: dict[Node, Place], thread: int, time: float) -> Place:
    """Return the place of what a thread does at a time."""
    node = trace.node_at(thread, time)
    return places[node] if node is not None else ELSEWHERE


def _of_kernels(trace: Trace, places: dict[Node, Place]) -> Iterator[Piece]:
    for kernel in trace.kernels:
        if is_exchange_kernel(kernel.name):
            continue
        place = place_at(trace, places, *kernel.launch) if kernel.launch else ELSEWHERE
        yield Piece(kernel.name, place, kernel.start, kernel.end)


def _of_thread(trace: Trace, places: dict[Node, Place]) -> Iterator[Piece]:
    """Yield the stretches of the step's thread between the borders of its nodes."""
    step = trace.step
    inside = [n for n in trace.threads[step.thread] if step.start <= n.start < step.end]
    open_nodes: list[Node] = []
    reached = step.start

    def stretch(until: float) -> Iterator[Piece]:
        nonlocal reached
        if open_nodes and until > reached and not is_exchange_call(open_nodes[-1].name):
            node = open_nodes[-1]
            yield Piece(PYTHON if node.is_range else node.name, places[node], reached, until)
        reached = max(reached, until)

    for node in inside:
        while open_nodes and open_nodes[-1].end <= node.start:
            yield from stretch(open_nodes[-1].end)
            open_nodes.pop()
        yield from stretch(node.start)
        open_nodes.append(node)
    while open_nodes:
        yield from stretch(open_nodes[-1].end)
        open_nodes.pop()
