"""Cuts what a few frames of a video need out of its file, into a small container of its own.

A decoder on the GPU reads whole containers from memory. Given pieces, it needs no memory for hours
of video, decodes several pieces side by side, and never has to seek, count or drop frames itself:
each piece begins where decoding can start and is timed anew.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from megatron_keye.data.probe import VideoInfo, opened_video

# WebM for VP9, which MP4 gives a header that parsers need not expect.
_FORMATS = {"h264": "mp4", "hevc": "mp4", "vp9": "webm"}
_MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One piece: a container whose first packet is the only one where decoding starts."""

    container: bytes
    """The whole of a small MP4 or WebM file."""
    indices: tuple[int, ...]
    """Frames wanted from it, as indices into the original file, ascending."""
    places: tuple[int, ...]
    """The same frames counted in the piece's own order of presentation."""


def cut_segments(info: VideoInfo, wanted: Sequence[int], max_frames: int) -> Iterator[Segment]:
    """Cut the pieces that hold the wanted frames, one at a time.

    Args:
        info: A video without `gpu_obstacle`.
        wanted: Indices into `info.times`, ascending, without repeats.
        max_frames: Most wanted frames of one piece.

    Returns:
        Pieces, together with all wanted frames in order.

    Raises:
        ValueError: Naming the file, when it no longer holds what `probe` saw.
    """
    entries = np.searchsorted(info.entry_points, np.asarray(wanted), side="right") - 1
    with opened_video(info.path) as (container, stream):
        start = 0
        while start < len(wanted):
            stop = start + 1
            while stop < min(start + max_frames, len(wanted)) and entries[stop] == entries[start]:
                stop += 1
            entry = int(info.entry_points[entries[start]])
            yield _cut(info, container, stream, entry, tuple(wanted[start:stop]))
            start = stop


def _cut(
    info: VideoInfo,
    container: InputContainer,
    stream: VideoStream,
    entry: int,
    indices: tuple[int, ...],
) -> Segment:
    """Cut from frame `entry` to the last of `indices`."""
    needed = info.timestamps[entry : indices[-1] + 1]
    packets = _packets(container, stream, needed)
    if not packets:
        raise ValueError(
            f"{info.path}: frames {entry} to {indices[-1]} are no longer where they were, "
            "expected the file that was probed; restore it"
        )
    times = np.array([packet.pts for packet in packets], dtype=np.int64)
    ranks = np.argsort(np.argsort(times))
    return Segment(
        container=_remux(stream, packets, ranks),
        indices=indices,
        places=tuple(index - entry for index in indices),
    )


def _packets(
    container: InputContainer, stream: VideoStream, needed: NDArray[np.int64]
) -> "list[av.Packet[VideoStream]]":
    """Return the packets from the first needed frame on until all are there, or none."""
    first = int(needed[0])
    for target in (first, None):
        # Some containers' indices lead past their mark; from the top every packet comes.
        if target is None:
            container.seek(0, backward=True, any_frame=True)
        else:
            container.seek(target, stream=stream, backward=True)
        missing = set(needed.tolist())
        packets: list[av.Packet[VideoStream]] = []
        for packet in container.demux(stream):
            if packet.size == 0 or packet.pts is None or not (packets or packet.pts == first):
                continue
            # Frames shown before the first one may refer to what is not there.
            if packet.pts >= first:
                packets.append(packet)
                missing.discard(packet.pts)
            if not missing:
                return packets
    return []


def _remux(
    template: VideoStream, packets: "Sequence[av.Packet[VideoStream]]", ranks: NDArray[np.int64]
) -> bytes:
    """Write packets into a container, timed by their rank so that none comes before its turn."""
    delay = int(np.max(np.arange(len(ranks)) - ranks, initial=0))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=_FORMATS[template.codec_context.name]) as target:
        stream = target.add_stream_from_template(template)
        stream.time_base = _MILLISECOND
        for place, (packet, rank) in enumerate(zip(packets, ranks.tolist(), strict=True)):
            copy = av.Packet(bytes(packet))
            copy.pts, copy.dts, copy.duration = rank + delay, place, 1
            copy.time_base, copy.stream = _MILLISECOND, stream
            copy.is_keyframe = place == 0
            target.mux(copy)
    return buffer.getvalue()
