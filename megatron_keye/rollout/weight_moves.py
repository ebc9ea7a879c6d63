# SPDX-License-Identifier: Apache-2.0
"""Which rank sends which part of which weight to whom, where a model generates on another grid.

A part is a box in a matrix of the whole model, named as in checkpoints. Both grids say which boxes
each rank has; all else follows from these, on every rank alike.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Sizes = tuple[int, ...]


class Box(NamedTuple):
    """A part of a matrix that one rank has in one piece."""

    name: str
    """The matrix: its key in checkpoints, with layer and expert."""
    offset: Sizes
    """Where the part begins in the whole matrix."""
    shape: Sizes
    """Its shape."""
    element_bytes: int
    """Bytes of an element."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return math.prod(self.shape) * self.element_bytes

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Return where this part lies in a tensor that holds another one, which has it all."""
        starts = [mine - theirs for mine, theirs in zip(self.offset, outer.offset, strict=True)]
        return tuple(
            slice(start, start + size) for start, size in zip(starts, self.shape, strict=True)
        )


class Move(NamedTuple):
    """A box that goes from one rank to another, or stays on its rank."""

    box: Box
    """What goes."""
    source: int
    """Rank that has it."""
    held: int
    """Which of the source's boxes has it."""
    target: int
    """Rank that wants it."""
    wanted: int
    """Which of the target's boxes gets it."""


Round = list[Move]
"""Moves that run in one exchange."""


def plan_moves(held: Sequence[Sequence[Box]], wanted: Sequence[Sequence[Box]]) -> list[Move]:
    """Return the moves that fill all wanted boxes.

    A rank that has something itself takes it from itself; else that holder sends it which has sent
    least so far.

    Args:
        held: By rank, the boxes that it has; two of a matrix are equal or have nothing in common.
        wanted: By rank, the boxes that it wants.
    """
    holders: dict[str, dict[Box, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for rank, boxes in enumerate(held):
        for number, box in enumerate(boxes):
            holders[box.name][box][rank] = number
    num_sent = [0] * len(held)
    moves = []
    for target, number, box in _by_turns(wanted):
        parts = [(_overlap(box, other), other) for other in holders[box.name]]
        found = [(part, other) for part, other in parts if part is not None]
        num_found = sum(part.num_bytes for part, _ in found)
        assert num_found == box.num_bytes, f"{box}: no rank has all of it, or ranks disagree"
        for part, other in found:
            ranks = holders[box.name][other]
            source = target if target in ranks else min(ranks, key=lambda r: (num_sent[r], r))
            if source != target:
                num_sent[source] += part.num_bytes
            moves.append(Move(part, source, ranks[source], target, number))
    return moves


def plan_rounds(moves: Sequence[Move], num_ranks: int, most_bytes: int) -> list[Round]:
    """Share the moves between ranks out to rounds, in each of which no rank needs much memory.

    Args:
        moves: From `plan_moves`; those that stay on their rank are left out.
        num_ranks: Ranks of the job.
        most_bytes: What a rank may send in a round, and what it may receive; larger boxes are cut.
            A single row that is larger goes alone.
    """
    rounds: list[Round] = []
    # Bytes that each rank sends in each round, and behind them those that it receives.
    loads: list[list[int]] = []
    for move in moves:
        if move.source == move.target:
            continue
        ends = (move.source, num_ranks + move.target)
        for box in _cut(move.box, most_bytes):
            number = next(
                (n for n, load in enumerate(loads) if _has_room(load, ends, box, most_bytes)),
                len(rounds),
            )
            if number == len(rounds):
                rounds.append([])
                loads.append([0] * (2 * num_ranks))
            rounds[number].append(move._replace(box=box))
            for end in ends:
                loads[number][end] += box.num_bytes
    return rounds


def _by_turns(wanted: Sequence[Sequence[Box]]) -> Iterator[tuple[int, int, Box]]:
    """Yield rank, number and box: the first box of each rank, then the second of each, and so on.

    So all ranks have something to send and to receive in all rounds.
    """
    for number in range(max(map(len, wanted), default=0)):
        for rank, boxes in enumerate(wanted):
            if number < len(boxes):
                yield rank, number, boxes[number]


def _overlap(one: Box, other: Box) -> Box | None:
    """Return what two boxes of a matrix have in common, None if that is nothing."""
    starts = tuple(map(max, one.offset, other.offset))
    ends = [
        min(a + size_a, b + size_b)
        for a, size_a, b, size_b in zip(
            one.offset, one.shape, other.offset, other.shape, strict=True
        )
    ]
    shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return one._replace(offset=starts, shape=shape) if all(s > 0 for s in shape) else None


def _cut(box: Box, most_bytes: int) -> Iterator[Box]:
    """Yield a box in parts of whole rows, each of at most so many bytes or a single row."""
    if box.num_bytes <= most_bytes or not box.shape:
        yield box
        return
    num_rows = max(1, most_bytes * box.shape[0] // box.num_bytes)
    for start in range(0, box.shape[0], num_rows):
        size = min(num_rows, box.shape[0] - start)
        yield box._replace(
            offset=(box.offset[0] + start, *box.offset[1:]), shape=(size, *box.shape[1:])
        )


def _has_room(load: Sequence[int], ends: tuple[int, int], box: Box, most_bytes: int) -> bool:
    return all(load[end] + box.num_bytes <= most_bytes for end in ends)
