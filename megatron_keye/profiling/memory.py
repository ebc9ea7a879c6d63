# SPDX-License-Identifier: Apache-2.0
"""What the memory that a traced step takes is for, over time.

What was there before the step is known by its owners. What the step allocates is told by where it
is taken and given back: taken in a forward pass and given back in a backward pass it is kept
activations; given back in the pass that took it, working memory.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from megatron_keye.profiling.places import Place
from megatron_keye.profiling.trace import Allocation, Trace

KINDS = ("activations", "working memory", "backward pass", "optimizer")
"""Kinds of what a step allocates. "backward pass": gradients of activations, and what the backward
pass works with. "optimizer": what the sum of gradients and the update take."""
_MOST_POINTS = 300


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of one traced step of one rank, in bytes."""

    held: dict[str, int]
    """What was there before the step, by kind."""
    seconds: list[float]
    """Times after the step's start."""
    kinds: dict[str, list[int]]
    """By kind of KINDS, the most at each of these times since the one before."""
    kept: dict[str, int]
    """Kept activations by module, at the time when they take most."""

    @property
    def peak(self) -> int:
        """Most that all kinds take together, what was there before included."""
        sums = [sum(values) for values in zip(*self.kinds.values(), strict=True)]
        return sum(self.held.values()) + max(sums, default=0)


@dataclass(slots=True)
class _Block:
    taken: float
    given_back: float
    num_bytes: int
    kind: str
    module: str


def measure_memory(
    trace: Trace, held: dict[str, int], place_at: Callable[[int, float], Place]
) -> StepMemory:
    """Return what a step's memory is for.

    Args:
        trace: Of the step.
        held: Bytes before it by kind, as far as owners are known. On a GPU what the allocator held
            beside them is the optimizer's state and the rest.
        place_at: Returns the place of what a thread does at a time.
    """
    blocks = _blocks(trace, place_at)
    if trace.kernels and trace.allocations:
        first = trace.allocations[0]
        rest = first.total_bytes - first.num_bytes - sum(held.values())
        held = held | {"optimizer state and rest": max(0, rest)}
    seconds, kinds = _over_time(blocks, trace.step.start, trace.step.end)
    return StepMemory(held=held, seconds=seconds, kinds=kinds, kept=_kept(blocks))


def _blocks(trace: Trace, place_at: Callable[[int, float], Place]) -> list[_Block]:
    """Return the blocks that the step takes, each until it is given back or the step's end."""
    step, blocks = trace.step, list[_Block]()
    open_blocks: dict[int, tuple[Allocation, Place]] = {}
    for each in trace.allocations:
        if not step.start <= each.time <= step.end:
            continue
        place = place_at(each.thread, each.time)
        if each.num_bytes > 0:
            open_blocks[each.address] = each, place
        elif each.address in open_blocks:
            taken, where = open_blocks.pop(each.address)
            blocks.append(_block(taken, where, each.time, place))
    end = Place("other", "backward")
    blocks += [_block(taken, where, step.end, end) for taken, where in open_blocks.values()]
    return blocks


def _block(taken: Allocation, where: Place, given_back: float, end: Place) -> _Block:
    if where.module == "optimizer":
        kind = "optimizer"
    elif where.in_pass == "backward":
        kind = "backward pass"
    else:
        kind = "activations" if end.in_pass == "backward" else "working memory"
    return _Block(taken.time, given_back, taken.num_bytes, kind, where.module)


def _over_time(
    blocks: list[_Block], start: float, end: float
) -> tuple[list[float], dict[str, list[int]]]:
    """Return times and, of each kind, the most bytes in each of the intervals between them."""
    width = (end - start) / _MOST_POINTS
    seconds = [index * width for index in range(1, _MOST_POINTS + 1)]
    kinds = {}
    for kind in KINDS:
        changes = sorted(
            change
            for block in blocks
            if block.kind == kind
            for change in ((block.taken, block.num_bytes), (block.given_back, -block.num_bytes))
        )
        levels = list(accumulate(change for _, change in changes))
        most, level, place = list[int](), 0, 0
        for second in seconds:
            highest = level
            while place < len(changes) and changes[place][0] <= start + second:
                level = levels[place]
                highest, place = max(highest, level), place + 1
            most.append(highest)
        kinds[kind] = most
    return seconds, kinds


def _kept(blocks: list[_Block]) -> dict[str, int]:
    """Return the kept activations by module when they take most, the largest first."""
    kept = [block for block in blocks if block.kind == "activations"]
    changes = sorted(
        (time, change)
        for block in kept
        for time, change in ((block.taken, block.num_bytes), (block.given_back, -block.num_bytes))
    )
    levels = list(accumulate(change for _, change in changes))
    if not levels:
        return {}
    highest = changes[max(range(len(levels)), key=lambda place: levels[place])][0]
    sums: dict[str, int] = defaultdict(int)
    for block in kept:
        if block.taken <= highest < block.given_back:
            sums[block.module] += block.num_bytes
    return dict(sorted(sums.items(), key=lambda item: item[1], reverse=True))
