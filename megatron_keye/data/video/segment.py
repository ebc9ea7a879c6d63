# SPDX-License-Identifier: Apache-2.0
"""Cuts what a few frames of a video need out of its file, into a small container of its own.

A decoder on the GPU reads whole containers from memory. Given segments, it needs no memory for
hours of video, decodes several segments side by side, and never has to seek, count or drop frames
itself: each segment begins where decoding can start, and has times of its own.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.bitstream.description import describe
from megatron_keye.data.bitstream.nal_units import unreferenced_frames
from megatron_keye.data.video.frame_runs import FrameRuns
from megatron_keye.data.video.packet_source import PacketSource, opened_packets
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError

# WebM for VP9, which MP4 gives a header that parsers need not expect.
_FORMATS = {"h264": "mp4", "hevc": "mp4", "vp9": "webm"}
_MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A container whose first packet is the only one that it calls a keyframe."""

    container: bytes
    """The whole of a small MP4 or WebM file."""
    indices: tuple[int, ...]
    """Frames wanted from it, as indices into the original file, ascending."""
    places: tuple[int, ...]
    """The same frames counted in the segment's own order of presentation."""
    height: int
    """Rows of decoded frames; those at the bottom that are not shown are still to be cropped."""
    width: int
    """Columns of decoded frames; those at the right that are not shown likewise."""


class SegmentCutter:
    """Cuts segments out of one open file, from any thread, one at a time."""

    def __init__(self, info: VideoInfo, source: PacketSource) -> None:
        self._info, self._source = info, source
        self._lock = threading.Lock()
        self._is_open = True
        try:
            self._description = describe(source.stream)
        except UserError as error:
            raise UserError(
                f"{info.path}: {error}, expected the file that was probed; restore it"
            ) from error

    def cut(self, frame_runs: FrameRuns) -> Segment:
        """Return the segment that holds these frames.

        Raises:
            UserError: Naming the file, when it no longer holds what `probe` saw.
        """
        with self._lock:
            if not self._is_open:
                raise UserError(f"{self._info.path}: was closed before it was cut")
            packets, display_order, places = self._read(frame_runs)
            sps = self._description.sps
            return Segment(
                container=self._write(packets, display_order),
                indices=frame_runs.indices,
                places=places,
                height=sps.stored_height if sps else self._source.stream.height,
                width=sps.stored_width if sps else self._source.stream.width,
            )

    def close(self) -> None:
        """Wait for the segment that is being cut; no other one will be."""
        with self._lock:
            self._is_open = False

    def _read(
        self, frame_runs: FrameRuns
    ) -> tuple[list[bytes], NDArray[np.int64], tuple[int, ...]]:
        """Return the packets of all runs, when each is shown, and when the wanted frames are."""
        packets: list[bytes] = []
        display_order: list[NDArray[np.int64]] = []
        places: list[int] = []
        for run in frame_runs.runs:
            frames, of_run = self._read_run(run)
            wanted = [index for index in frame_runs.indices if index in run]
            frames, of_run = self._without_unneeded(frames, of_run, set(wanted))
            shown = np.argsort(frames)
            places += (len(packets) + np.searchsorted(np.sort(frames), wanted)).tolist()
            display_order.append(len(packets) + np.argsort(shown))
            packets += of_run
        return packets, np.concatenate(display_order), tuple(places)

    def _read_run(self, run: range) -> tuple[list[int], list[bytes]]:
        """Return the frames of a run in stored order, with their packets."""
        frames: list[int] = []
        packets: list[bytes] = []
        missing = set(run)
        for number, packet in self._source.read(self._info.entry_before([run.start])):
            # Frames shown before the first one may refer to what is not there.
            frame = int(self._info.packet_frames[number])
            if frame >= run.start and (frames or frame == run.start):
                frames.append(frame)
                packets.append(bytes(packet))
                missing.discard(frame)
            if not missing:
                break
        return frames, packets

    def _without_unneeded(
        self, frames: list[int], packets: list[bytes], wanted: set[int]
    ) -> tuple[list[int], list[bytes]]:
        """Leave out frames that are neither wanted nor referred to by any other."""
        if len(packets) == len(wanted):
            return frames, packets
        unreferenced = unreferenced_frames(
            self._description.codec, packets, self._description.extradata
        )
        # The second frame keeps this run's random access point apart from the next run's.
        kept = [
            place
            for place, frame in enumerate(frames)
            if place < 2 or frame in wanted or not unreferenced[place]
        ]
        return [frames[place] for place in kept], [packets[place] for place in kept]

    def _write(self, packets: list[bytes], display_order: NDArray[np.int64]) -> bytes:
        """Write packets without cropping, timed by display order and late enough to decode."""
        delay = int(np.max(np.arange(len(display_order)) - display_order, initial=0))
        description, sps = self._description, self._description.sps
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=_FORMATS[description.codec]) as target:
            stream = target.add_stream_from_template(self._source.stream)
            stream.time_base = _MILLISECOND
            if sps is not None and sps.is_cropped:
                stream.codec_context.extradata = description.uncropped
                stream.height, stream.width = sps.stored_height, sps.stored_width
            for place, (content, display_place) in enumerate(
                zip(packets, display_order.tolist(), strict=True)
            ):
                packet = av.Packet(description.without_cropping(content))
                packet.pts, packet.dts, packet.duration = display_place + delay, place, 1
                packet.time_base, packet.stream = _MILLISECOND, stream
                packet.is_keyframe = place == 0
                target.mux(packet)
        return buffer.getvalue()


@contextmanager
def opened_cutter(info: VideoInfo) -> Iterator[SegmentCutter]:
    """Open a video to be cut.

    Args:
        info: A video without `gpu_unsupported_reason`.

    Raises:
        UserError: Naming the file that cannot be read.
    """
    with opened_packets(info) as source:
        cutter = SegmentCutter(info, source)
        try:
            yield cutter
        finally:
            cutter.close()
