# SPDX-License-Identifier: Apache-2.0
"""Temporal intersection over union is that of sets of instants."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.scoring.intervals import Interval, merge, temporal_iou

MOST = 20
pairs = st.tuples(st.integers(0, MOST), st.integers(0, MOST))
stretches = st.lists(pairs.map(lambda p: (float(min(p)), float(max(p)))), max_size=5)


def on_a_grid(intervals: list[Interval]) -> np.ndarray:
    """Return which of the seconds from 0 to MOST are inside."""
    inside = np.zeros(MOST, dtype=bool)
    for start, end in intervals:
        inside[int(start) : int(end)] = True
    return inside


@pytest.mark.parametrize(
    ("answer", "truth", "iou"),
    [
        ([(0, 10)], [(5, 15)], 5 / 15),
        ([(2, 4), (6, 8)], [(3, 7)], 2 / 6),
        ([(0, 3), (2, 5)], [(0, 5)], 1),
        ([(0, 1)], [(1, 2)], 0),
        ([], [], 1),
        ([], [(1, 2)], 0),
        ([(1, 2)], [], 0),
        ([(3, 3)], [(3, 3)], 1),
        ([(3, 3)], [(4, 4)], 0),
        ([(5, math.inf)], [(5, 10)], 1),
    ],
)
def test_values_by_hand(answer: list[Interval], truth: list[Interval], iou: float) -> None:
    assert temporal_iou(answer, truth) == pytest.approx(iou)


def test_both_are_clipped_to_the_video() -> None:
    assert temporal_iou([(5, math.inf)], [(5, 10)], seconds=20) == pytest.approx(5 / 15)
    assert temporal_iou([(5, 30)], [(5, 10)], seconds=10) == 1
    assert temporal_iou([(30, 40)], [], seconds=10) == 0, "something is claimed to happen"
    assert temporal_iou([(30, 40)], [(5, 10)], seconds=10) == 0
    assert temporal_iou([(30, 40)], [(30, 40)], seconds=10) == 0, "nothing of the video is meant"


@given(stretches, stretches)
def test_it_is_symmetric_and_that_of_a_grid(answer: list[Interval], truth: list[Interval]) -> None:
    iou = temporal_iou(answer, truth)
    assert iou == pytest.approx(temporal_iou(truth, answer))
    one, other = on_a_grid(answer), on_a_grid(truth)
    if (one | other).any() and answer and truth:
        assert iou == pytest.approx((one & other).sum() / (one | other).sum())
    assert 0 <= iou <= 1 and temporal_iou(answer, answer) == 1


@given(stretches, st.randoms(use_true_random=False))
def test_order_and_cuts_change_nothing(intervals: list[Interval], random: object) -> None:
    cut = [piece for a, b in intervals for piece in ((a, (a + b) / 2), ((a + b) / 2, b))]
    random.shuffle(cut)  # type: ignore[attr-defined]
    assert merge(cut) == merge(intervals)
    assert temporal_iou(cut, intervals) == 1
