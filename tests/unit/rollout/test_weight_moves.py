# SPDX-License-Identifier: Apache-2.0
"""Moves between any two ways to split a matrix fill what is wanted, in rounds of bounded size."""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.rollout.weight_moves import Box, plan_moves, plan_rounds

SHAPE = (24, 4)


def split(name: str, num_ranks: int, degree: int, dim: int) -> list[Box]:
    """Return the box of each rank where a matrix is split by some ranks; others are replicas."""
    size = SHAPE[dim] // degree
    shape = tuple(size if d == dim else SHAPE[d] for d in range(2))
    offsets = [
        tuple(rank % degree * size * (d == dim) for d in range(2)) for rank in range(num_ranks)
    ]
    return [Box(name, offset, shape, 2) for offset in offsets]


def moved(
    held: Sequence[Sequence[Box]], wanted: Sequence[Sequence[Box]], most_bytes: int
) -> list[list[np.ndarray]]:
    """Return what each rank gets, by its boxes, from ranks that hold numbered elements."""
    whole = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    names = {box.name for boxes in held for box in boxes}
    wholes = {name: whole + 1000 * number for number, name in enumerate(sorted(names))}

    def at(box: Box) -> tuple[slice, ...]:
        return box.within(Box(box.name, (0, 0), SHAPE, 2))

    have = [[wholes[box.name][at(box)] for box in boxes] for boxes in held]
    got = [[np.full(box.shape, -1) for box in boxes] for boxes in wanted]
    moves = plan_moves(held, wanted)
    rounds = plan_rounds(moves, len(held), most_bytes)
    stay = [move for move in moves if move.source == move.target]
    for move in [*stay, *(move for each in rounds for move in each)]:
        origin = have[move.source][move.held][move.box.within(held[move.source][move.held])]
        place = move.box.within(wanted[move.target][move.wanted])
        assert (got[move.target][move.wanted][place] == -1).all(), "nothing comes twice"
        got[move.target][move.wanted][place] = origin
    for each in rounds:
        for side in ("source", "target"):
            loads = Counter[int]()
            for move in each:
                loads[getattr(move, side)] += move.box.num_bytes
            assert max(loads.values()) <= most_bytes
    for boxes, arrays in zip(wanted, got, strict=True):
        for box, array in zip(boxes, arrays, strict=True):
            assert np.array_equal(array, wholes[box.name][at(box)])
    return got


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_split_becomes_any_other(data: st.DataObject) -> None:
    num_ranks = data.draw(st.sampled_from([2, 4, 6]))
    most_bytes = data.draw(st.sampled_from([8, 24, 10_000]))
    grids = []
    for _ in range(2):
        degrees = [d for d in (1, 2, 4, 6) if num_ranks % d == 0]
        by_name = [
            split(name, num_ranks, data.draw(st.sampled_from(degrees[: 2 + (dim == 0)])), dim)
            for name, dim in (("rows", 0), ("columns", 1))
        ]
        grids.append([list(boxes) for boxes in zip(*by_name, strict=True)])
    moved(*grids, most_bytes)


def test_stages_and_experts_come_from_the_ranks_that_have_them() -> None:
    # Two stages of two ranks; layer 0 is on ranks 0 and 1, and each rank has half of the experts.
    def layer(number: int, experts: Sequence[int]) -> list[Box]:
        names = [f"linear[{number}]", *(f"expert[{number},{e}]" for e in experts)]
        return [Box(name, (0, 0), SHAPE, 2) for name in names]

    experts = [(0, 1), (2, 3)]
    held = [layer(stage, experts[rank]) for stage, rank in product(range(2), range(2))]
    wanted = [layer(0, experts[rank % 2]) + layer(1, experts[rank % 2]) for rank in range(4)]
    moved(held, wanted, 10_000)
    moves = [move for move in plan_moves(held, wanted) if move.source != move.target]
    assert len(moves) == 4 * 3, "each rank gets the layer of the other stage, and nothing else"
    assert {move.source for move in moves} == {0, 1, 2, 3}
    of_linear = [move.source for move in moves if move.box.name.startswith("linear")]
    assert sorted(of_linear) == [0, 1, 2, 3], "replicas share the work"


def test_ranks_that_disagree_about_the_model_are_found() -> None:
    held = [[Box("a", (0, 0), (4, 4), 2)], []]
    with pytest.raises(AssertionError, match="no rank has all of it"):
        plan_moves(held, [[], [Box("a", (0, 0), (5, 4), 2)]])
