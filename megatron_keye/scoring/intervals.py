# SPDX-License-Identifier: Apache-2.0
"""Stretches of time, and how far two sets of them agree: temporal intersection over union."""

import math
from collections.abc import Iterable, Sequence

Interval = tuple[float, float]
"""Start and end in seconds, the end not before the start."""

RECALL_THRESHOLDS = (0.3, 0.5, 0.7)
"""Overlaps at which benchmarks of temporal grounding count an answer as right."""


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same stretches in order of time, those that touch as one."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def clip(intervals: Iterable[Interval], seconds: float) -> list[Interval]:
    """Return what lies within a video, from 0 to `seconds`."""
    inside = [(max(0.0, start), min(seconds, end)) for start, end in intervals]
    return [(start, end) for start, end in inside if start <= end]


def temporal_iou(
    answer: Sequence[Interval], truth: Sequence[Interval], seconds: float | None = None
) -> float:
    """Return |answer and truth| / |answer or truth|, both as sets of instants.

    Args:
        answer: In any order; stretches may overlap.
        truth: Likewise.
        seconds: Length of the video, to which both are clipped; None does not clip. An end left
            open (infinity) is then the last end that is known.

    Returns:
        0 to 1. Where the truth is that nothing happens, 1 for an empty answer and 0 for any other,
        also for one that lies outside the video.
    """
    if not answer or not truth:
        return float(not answer and not truth)
    if seconds is None:
        ends = [end for _, end in (*answer, *truth)]
        seconds = max((end for end in ends if math.isfinite(end)), default=0.0)
    answer, truth = clip(answer, seconds), clip(truth, seconds)
    answer, truth = merge(answer), merge(truth)
    shared = _shared_seconds(answer, truth)
    total = sum(end - start for start, end in (*answer, *truth)) - shared
    # Instants have no length, so that only equality tells.
    return shared / total if total > 0 else float(bool(truth) and answer == truth)


def _shared_seconds(one: Sequence[Interval], other: Sequence[Interval]) -> float:
    """Return the length of the intersection of two merged sets."""
    shared, index, place = 0.0, 0, 0
    while index < len(one) and place < len(other):
        (start, end), (other_start, other_end) = one[index], other[place]
        shared += max(0.0, min(end, other_end) - max(start, other_start))
        if end < other_end:
            index += 1
        else:
            place += 1
    return shared
