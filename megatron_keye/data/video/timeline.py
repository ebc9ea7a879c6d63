# SPDX-License-Identifier: Apache-2.0
"""Orders the frames of a stream by their times, and decides from which packet each is decoded.

A frame by index is one frame, however it is reached, because of two rules: all packets in front
of an entry point hold frames that are shown before it, and no two frames are shown at one time.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from av.container import InputContainer
from av.format import Flags
from av.video.stream import VideoStream
from numpy.typing import NDArray

from megatron_keye.data.video.packet_list import Candidate, PacketList
from megatron_keye.data.video.video_info import EntryPoints, Integers
from megatron_keye.errors import UserError

MAX_REORDERED = 16
"""No codec stores a frame more places than this before or after its turn."""
_UNORDERED = ("avi", "asf", "mxf")
"""Containers that need not state in which order frames are shown."""
_RE_ENCODE = "re-encode it (ffmpeg -i IN OUT.mp4)"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """The part of a `VideoInfo` that follows from packets alone; fields as there."""

    timestamps: Integers
    packet_sizes: Integers
    packet_frames: Integers
    entries: EntryPoints


def make_timeline(
    path: Path, container: InputContainer, stream: VideoStream, packets: PacketList
) -> Timeline:
    """Order the frames of a stream.

    Frames that are stored before the first entry point, or shown before it, refer to what is not
    there, as after a cut. They are left out, as MP4's edit lists leave them out.

    Raises:
        UserError: Naming the file, for frames that are damaged, without times, with times that
            start again or are the same, or none that can be decoded, and for a container that
            hides their order.
    """
    times, shown = _shown_times(path, container, stream, packets)
    # The latest frame of all packets in front of each.
    latest = np.maximum.accumulate(np.where(shown, times, np.iinfo(np.int64).min))
    before = np.concatenate([[np.iinfo(np.int64).min], latest[:-1]])
    _check_restarts(path, stream, packets.candidates, times, before, shown)
    if not packets.are_whole:
        raise UserError(f"{path}: is cut short or damaged inside a frame; copy it again")
    entries = _usable(packets.candidates, times, before)
    if entries:
        shown = _without_unreferenced(path, shown, times, entries[0].exact_packet)
    if not shown.any() or not entries:
        raise UserError(
            f"{path}: has no frame at which decoding can begin, expected one that refers to no "
            f"other; {_RE_ENCODE}"
        )
    timestamps, packet_frames = np.unique(times[shown]), np.full(len(times), -1)
    packet_frames[shown] = np.searchsorted(timestamps, times[shown])
    arrays = timestamps, packet_frames, np.array(packets.sizes, dtype=np.int64)
    for array in arrays:
        array.setflags(write=False)
    return Timeline(
        timestamps=timestamps,
        packet_sizes=arrays[2],
        packet_frames=packet_frames,
        entries=_entry_points(entries, times, timestamps),
    )


def _shown_times(
    path: Path, container: InputContainer, stream: VideoStream, packets: PacketList
) -> tuple[Integers, NDArray[np.bool_]]:
    """Return the time of each packet's frame, and whether it is shown."""
    is_ordered = _is_ordered(path, container, stream, packets)
    stated = packets.timestamps if is_ordered else packets.decode_timestamps
    are_timed = np.array([time is not None for time in stated])
    shown = np.array(packets.are_shown, dtype=bool) & ~_are_before_zero(container, are_timed)
    num_untimed = int((shown & ~are_timed).sum())
    if num_untimed and packets.are_whole:
        raise UserError(
            f"{path}: {num_untimed} of {int(shown.sum())} frames have no presentation time, "
            f"expected one on each; {_RE_ENCODE}"
        )
    return np.array([time or 0 for time in stated], dtype=np.int64), shown & are_timed


def _are_before_zero(container: InputContainer, are_timed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which frames are shown before Matroska's zero, where it can't state their time.

    They follow the first keyframe of a clip that was cut, and refer to what was cut off.
    """
    are_before = np.zeros(len(are_timed), dtype=bool)
    if container.format.name.startswith("matroska") and are_timed[0] and are_timed[1:].any():
        num_frames = min(int(np.argmax(are_timed[1:])), MAX_REORDERED)
        are_before[1 : 1 + num_frames] = True
    return are_before


def _without_unreferenced(
    path: Path, shown: NDArray[np.bool_], times: Integers, first: int
) -> NDArray[np.bool_]:
    """Leave out frames that are stored or shown before the first one that is exact."""
    kept: NDArray[np.bool_] = shown & (np.arange(len(times)) >= first) & (times >= times[first])
    if num_left_out := int(shown.sum() - kept.sum()):
        _logger.warning(
            "%s: %d frames at its start refer to what is not there, and are left out",
            path,
            num_left_out,
        )
    return kept


def _is_ordered(
    path: Path, container: InputContainer, stream: VideoStream, packets: PacketList
) -> bool:
    """Return whether the container states when frames are shown; else, in stored order.

    Raises:
        UserError: Naming the file, for frames whose order it hides, and for bare streams.
    """
    name = container.format.name
    if container.format.flags & cast(int, Flags.no_timestamps.value):
        raise UserError(
            f"{path}: is a bare stream ({name}), which states no times, expected a container; "
            f"{_RE_ENCODE}"
        )
    times = [time or 0 for time in packets.timestamps]
    # MXF's index may state it.
    is_ordered = name not in _UNORDERED or (name == "mxf" and times != sorted(times))
    is_reordered = stream.codec_context.has_b_frames or not all(packets.are_shown)
    if not is_ordered and is_reordered:
        raise UserError(
            f"{path}: is an {name.upper()} whose frames are not stored in the order of showing, "
            f"expected another container, since {name.upper()} does not state that order; "
            f"{_RE_ENCODE}"
        )
    return is_ordered


def _check_restarts(
    path: Path,
    stream: VideoStream,
    candidates: list[Candidate],
    times: Integers,
    before: Integers,
    shown: NDArray[np.bool_],
) -> None:
    """Refuse times that go back further than codecs reorder frames, or that occur twice."""
    # The latest frame of all packets that are too far in front to be shown later.
    far_before = np.full(len(times), np.iinfo(np.int64).min)
    far_before[MAX_REORDERED:] = before[: max(0, len(times) - MAX_REORDERED)]
    goes_back = times <= far_before
    resets = [candidate.packet for candidate in candidates if candidate.is_reset]
    goes_back[resets] |= times[resets] <= before[resets]
    where = np.flatnonzero(goes_back & shown)
    if where.size:
        seconds = np.float64(stream.time_base)
        raise UserError(
            f"{path}: its times start again at {times[where[0]] * seconds:.3f} s after "
            f"{before[where[0]] * seconds:.3f} s, as in recordings that were joined byte by byte, "
            "expected times that go on; join the recordings again with ffmpeg -f concat -i LIST "
            "-c copy OUT.mp4"
        )
    num_equal = int(shown.sum()) - len(np.unique(times[shown]))
    if num_equal:
        raise UserError(
            f"{path}: {num_equal} frames have the time of another, expected a time of its own for "
            f"each; {_RE_ENCODE}"
        )


def _usable(candidates: list[Candidate], times: Integers, before: Integers) -> list[Candidate]:
    """Return the candidates behind which no frame is shown that is stored before them."""
    usable: list[Candidate] = []
    for candidate in reversed(candidates):
        exact = candidate.exact_packet
        if exact < 0 or times[exact] <= before[exact]:
            continue
        # A refresh that ends after a later entry point is of no use.
        if not usable or exact < usable[-1].exact_packet:
            usable.append(candidate)
    return usable[::-1]


def _entry_points(entries: list[Candidate], times: Integers, timestamps: Integers) -> EntryPoints:
    """Return the entry points as arrays."""
    exact = [entry.exact_packet for entry in entries]
    columns = {
        "packets": [entry.packet for entry in entries],
        "exact_packets": exact,
        "first_frames": np.searchsorted(timestamps, times[exact]),
        "resets": [entry.is_reset for entry in entries],
        "anchors": [entry.anchor[0] for entry in entries],
        "positions": [entry.anchor[1] for entry in entries],
        "timestamps": [entry.timestamp for entry in entries],
        "decode_timestamps": [entry.decode_timestamp for entry in entries],
        "checksums": [entry.checksum for entry in entries],
    }
    arrays = {name: np.array(column, dtype=np.int64) for name, column in columns.items()}
    for array in arrays.values():
        array.setflags(write=False)
    return EntryPoints(**arrays)
