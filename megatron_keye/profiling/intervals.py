# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of intervals, each a start and an end."""

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals that cover the same, ascending."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def covered(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of intervals."""
    return sum(end - start for start, end in union(intervals))


def exposed(communicating: Sequence[Interval], computing: Sequence[Interval]) -> float:
    """Return for how long there was communication and no computation beside it."""
    return covered([*communicating, *computing]) - covered(computing)
