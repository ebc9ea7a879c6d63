"""Which frames of a video are decoded together, each piece by a decoder that has seen nothing.

Beginning a piece costs a decoder on the GPU 6 to 11 ms at 720p, as much as 7 frames of H.264, so
pieces run over many random access points; what lies between the frames that are wanted is left out where
an random access point allows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_SKIPPED = 16
"""Frames between two runs at least. No codec stores a frame earlier than so many before its turn,
so that what is stored between frames of one run is never the beginning of the next one."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Frames that are decoded in one go."""

    indices: tuple[int, ...]
    """Frames wanted, ascending."""
    runs: tuple[range, ...]
    """Frames that are decoded, ascending; each run begins at an random access point."""


@dataclass(frozen=True, kw_only=True)
class _Section:
    """Wanted frames behind one random access point and before the next one."""

    wanted: tuple[int, ...]
    run: range
    stands_alone: bool
    """Whether the random access point has no frame behind it before the next one."""


def plan_pieces(
    random_access_points: NDArray[np.int64],
    num_frames: int,
    wanted: Sequence[int],
    *,
    max_wanted: int,
    max_decoded: int,
) -> list[Piece]:
    """Divide the wanted frames of a video into pieces.

    Args:
        random_access_points: As in `VideoInfo`; the first is 0.
        num_frames: Frames in the file.
        wanted: Indices, ascending, without repeats.
        max_wanted: Most wanted frames of one piece.
        max_decoded: Most frames that are decoded for one piece, unless a single random access point is
            followed by more.

    Returns:
        Pieces, together with all wanted frames in order.
    """
    pieces: list[Piece] = []
    indices: tuple[int, ...] = ()
    runs: tuple[range, ...] = ()
    ends_alone = False
    for section in _sections(random_access_points, num_frames, wanted, max_wanted):
        joined = _join(runs, section.run, ends_alone=ends_alone)
        is_full = len(indices) + len(section.wanted) > max_wanted
        if indices and (is_full or not joined or sum(map(len, joined)) > max_decoded):
            pieces.append(Piece(indices=indices, runs=runs))
            indices, joined = (), (section.run,)
        indices, runs, ends_alone = indices + section.wanted, joined, section.stands_alone
    if indices:
        pieces.append(Piece(indices=indices, runs=runs))
    return pieces


def _sections(
    random_access_points: NDArray[np.int64],
    num_frames: int,
    wanted: Sequence[int],
    max_wanted: int,
) -> Iterator[_Section]:
    """Group wanted frames by random access point, `max_wanted` at most."""
    entries = np.searchsorted(random_access_points, np.asarray(wanted), side="right") - 1
    start = 0
    while start < len(wanted):
        stop = start + 1
        while stop < min(start + max_wanted, len(wanted)) and entries[stop] == entries[start]:
            stop += 1
        following = int(entries[start]) + 1
        entry = int(random_access_points[following - 1])
        end = (
            int(random_access_points[following])
            if following < len(random_access_points)
            else num_frames
        )
        # Two random access points in a row may look like one picture to a decoder, so each takes a frame
        # along that is none.
        run = range(entry, max(wanted[stop - 1] + 1, min(entry + 2, end)))
        yield _Section(wanted=tuple(wanted[start:stop]), run=run, stands_alone=end == entry + 1)
        start = stop


def _join(runs: tuple[range, ...], run: range, *, ends_alone: bool) -> tuple[range, ...]:
    """Add a run behind others: through what lies between, or leaving it out; () if neither."""
    if not runs:
        return (run,)
    last = runs[-1]
    if run.start - last.stop < LEAST_SKIPPED:
        return (*runs[:-1], range(last.start, run.stop))
    return () if ends_alone else (*runs, run)
