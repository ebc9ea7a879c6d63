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
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from megatron_keye.data.bitstream.description import describe
from megatron_keye.data.bitstream.nal_units import unreferenced_frames
from megatron_keye.data.video.frame_runs import FrameRuns
from megatron_keye.data.video.probe import VideoInfo, opened_video
from megatron_keye.errors import UserError

type _Packets = "list[av.Packet[VideoStream]]"

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

    def __init__(self, info: VideoInfo, container: InputContainer, stream: VideoStream) -> None:
        self._info, self._container, self._stream = info, container, stream
        self._lock = threading.Lock()
        self._is_open = True
        try:
            self._description = describe(stream)
        except UserError as error:
            raise UserError(
                f"{info.path}: {error}, expected the file that was probed; restore it"
            ) from error

    def cut(self, frame_runs: FrameRuns) -> Segment:
        """Return the segment that holds these frames.

        Raises:
            UserError: Naming the file, when it no longer holds what `probe` saw, or holds
                parameters between its keyframes that keep it from the GPU.
        """
        with self._lock:
            if not self._is_open:
                raise UserError(f"{self._info.path}: was closed before it was cut")
            packets, display_order, places = self._read(frame_runs)
            self._check(packets)
            sps = self._description.sps
            return Segment(
                container=self._write(packets, display_order),
                indices=frame_runs.indices,
                places=places,
                height=sps.stored_height if sps else self._stream.height,
                width=sps.stored_width if sps else self._stream.width,
            )

    def close(self) -> None:
        """Wait for the segment that is being cut; no other one will be."""
        with self._lock:
            self._is_open = False

    def _read(
        self, frame_runs: FrameRuns
    ) -> tuple[list[bytes], NDArray[np.int64], tuple[int, ...]]:
        """Return the packets of all runs, when each is shown, and when the wanted frames are."""
        timestamps = self._info.timestamps
        packets: list[bytes] = []
        display_order: list[NDArray[np.int64]] = []
        places: list[int] = []
        for run in frame_runs.runs:
            of_run = _packets(self._container, self._stream, timestamps[run.start : run.stop])
            if not of_run:
                raise UserError(
                    f"{self._info.path}: frames {run.start} to {run.stop - 1} are no longer where "
                    "they were, expected the file that was probed; restore it"
                )
            wanted = [int(timestamps[index]) for index in frame_runs.indices if index in run]
            of_run = self._without_unneeded(of_run, set(wanted))
            times = np.array([packet.pts for packet in of_run], dtype=np.int64)
            shown = np.argsort(times)
            places += (len(packets) + np.searchsorted(times[shown], wanted)).tolist()
            display_order.append(len(packets) + np.argsort(shown))
            packets += map(bytes, of_run)
        return packets, np.concatenate(display_order), tuple(places)

    def _without_unneeded(self, packets: _Packets, wanted: set[int]) -> _Packets:
        """Leave out frames that are neither wanted nor referred to by any other."""
        if len(packets) == len(wanted):
            return packets
        unreferenced = unreferenced_frames(
            self._description.codec, list(map(bytes, packets)), self._description.extradata
        )
        # The second frame keeps this run's random access point apart from the next run's.
        return packets[:2] + [
            packet
            for packet, is_unreferenced in zip(packets[2:], unreferenced[2:], strict=True)
            if packet.pts in wanted or not is_unreferenced
        ]

    def _check(self, packets: list[bytes]) -> None:
        """Refuse parameters that `probe`, which looks into keyframes only, did not see."""
        for packet in packets:
            if reason := self._description.unsupported_reason(packet):
                raise UserError(
                    f"{self._info.path}: can't be decoded on the GPU, since {reason}, expected "
                    "parameters at keyframes only; decode with data.decode.backend=pyav"
                )

    def _write(self, packets: list[bytes], display_order: NDArray[np.int64]) -> bytes:
        """Write packets without cropping, timed by display order and late enough to decode."""
        delay = int(np.max(np.arange(len(display_order)) - display_order, initial=0))
        description, sps = self._description, self._description.sps
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=_FORMATS[description.codec]) as target:
            stream = target.add_stream_from_template(self._stream)
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
    with opened_video(info.path) as (container, stream):
        cutter = SegmentCutter(info, container, stream)
        try:
            yield cutter
        finally:
            cutter.close()


def _packets(
    container: InputContainer, stream: VideoStream, needed: NDArray[np.int64]
) -> _Packets:
    """Return the packets from the first needed frame on until all are there, or none."""
    first = int(needed[0])
    for target in (first, None):
        # Some containers' indices lead past their mark; from the top every packet comes.
        if target is None:
            container.seek(0, backward=True, any_frame=True)
        else:
            container.seek(target, stream=stream, backward=True)
        missing = set(needed.tolist())
        packets: _Packets = []
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
