# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video are decoded together, each group by a decoder without any state.

Starting a segment costs a decoder on the GPU 6 to 11 ms at 720p, as much as 7 frames of H.264, so
segments run over many random access points; frames between the wanted ones are left out where a
random access point allows it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_SKIPPED = 16
"""Frames between two runs at least. No codec stores a frame more than 16 places before its turn,
so what is stored between frames of one run is never the beginning of the next one."""


@dataclass(frozen=True, kw_only=True)
class FrameRuns:
    """Frames that are decoded together."""

    indices: tuple[int, ...]
    """Frames wanted, ascending."""
    runs: tuple[range, ...]
    """Frames that are decoded, ascending; each run begins at a random access point."""


@dataclass(frozen=True, kw_only=True)
class _Section:
    """Wanted frames between one random access point and the next."""

    wanted: tuple[int, ...]
    run: range
    is_single_frame: bool
    """Whether the next random access point follows immediately."""


def plan_frame_runs(
    random_access_points: NDArray[np.int64],
    num_frames: int,
    wanted: Sequence[int],
    *,
    max_wanted: int,
    max_decoded: int,
) -> list[FrameRuns]:
    """Divide the wanted frames of a video among segments.

    Args:
        random_access_points: As in `VideoInfo`; the first is 0.
        num_frames: Frames in the file.
        wanted: Indices, ascending, without repeats.
        max_wanted: Most wanted frames of one segment.
        max_decoded: Most frames that are decoded for one segment, unless a single random access
            point is followed by more.

    Returns:
        One for each segment, together all wanted frames in order.
    """
    planned: list[FrameRuns] = []
    indices: tuple[int, ...] = ()
    runs: tuple[range, ...] = ()
    ends_single = False
    for section in _sections(random_access_points, num_frames, wanted, max_wanted):
        joined = _join(runs, section.run, ends_single=ends_single)
        is_full = len(indices) + len(section.wanted) > max_wanted
        if indices and (is_full or not joined or sum(map(len, joined)) > max_decoded):
            planned.append(FrameRuns(indices=indices, runs=runs))
            indices, joined = (), (section.run,)
        indices, runs, ends_single = indices + section.wanted, joined, section.is_single_frame
    if indices:
        planned.append(FrameRuns(indices=indices, runs=runs))
    return planned


def _sections(
    random_access_points: NDArray[np.int64],
    num_frames: int,
    wanted: Sequence[int],
    max_wanted: int,
) -> Iterator[_Section]:
    """Group wanted frames by random access point, `max_wanted` at most."""
    points = np.append(random_access_points, num_frames).tolist()
    point_of = np.searchsorted(random_access_points, np.asarray(wanted), side="right") - 1
    start = 0
    while start < len(wanted):
        stop = start + 1
        while stop < min(start + max_wanted, len(wanted)) and point_of[stop] == point_of[start]:
            stop += 1
        first, end = points[point_of[start]], points[point_of[start] + 1]
        # To a decoder, two random access points in a row may look like one frame, so each run
        # takes along a second frame.
        run = range(first, max(wanted[stop - 1] + 1, min(first + 2, end)))
        yield _Section(wanted=tuple(wanted[start:stop]), run=run, is_single_frame=end == first + 1)
        start = stop


def _join(runs: tuple[range, ...], run: range, *, ends_single: bool) -> tuple[range, ...]:
    """Add a run to others: through what lies between, or leaving it out; () if neither."""
    if not runs:
        return (run,)
    last = runs[-1]
    if run.start - last.stop < MIN_SKIPPED:
        return (*runs[:-1], range(last.start, run.stop))
    return () if ends_single else (*runs, run)
