"""What a video's container states: when each frame is shown, its size and its orientation.

Everything is planned from this, so it only demuxes: no frame is decoded, and the container's
average rate, which is wrong in real files, is never read.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from megatron_keye.data.bitstream.description import describe
from megatron_keye.data.bitstream.nal_units import is_random_access_point
from megatron_keye.data.video.gpu_rules import (
    packet_unsupported_reason,
    stream_unsupported_reason,
    timeline_unsupported_reason,
)
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoInfo:
    """A video file before decoding."""

    path: Path
    """File."""
    times: NDArray[np.float64]
    """When each frame is shown, in seconds, ascending [frames]. A positive start offset of the
    whole container, as MPEG-TS has, is taken off, as players do."""
    timestamps: NDArray[np.int64]
    """The same in the stream's own units, by which a decoded frame is recognised [frames]."""
    keyframes: NDArray[np.int64]
    """Indices, in presentation order, of the frames where decoding can start."""
    random_access_points: NDArray[np.int64]
    """Those of them from which a decoder without any state decodes each later frame correctly;
    frames shown before one, but stored after it, it does not."""
    color_space: int
    """FFmpeg's number of the rule by which luma and colour differences become RGB."""
    gpu_unsupported_reason: str
    """Why a GPU would not decode this file correctly, "" if it would."""
    height: int
    """Pixels down, as shown."""
    width: int
    """Pixels across, as shown; stored pixels, the sample aspect ratio is not applied."""
    rotation: int
    """Degrees counter-clockwise, 0, 90, 180 or 270, by which stored frames are rotated."""
    is_mirrored: bool
    """Whether stored frames are flipped left to right before they are rotated."""

    @property
    def num_frames(self) -> int:
        """Frames in the file."""
        return len(self.times)


@contextmanager
def opened_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first real video stream of a file.

    Args:
        path: Video file.

    Returns:
        Container and stream, closed on leaving.

    Raises:
        UserError: Naming the file: missing, empty, no container, no video in it; also for what
            FFmpeg raises inside the `with` block.
    """
    if not path.is_file():
        raise UserError(f"{path}: is not there, expected a video file; correct the name")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: has 0 bytes, expected a video file; copy it again")
    try:
        with av.open(str(path)) as container:
            yield container, _video_stream(path, container)
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: cannot be read as a video ({error.strerror}), expected a whole, undamaged "
            "video file; copy it again or drop the sample"
        ) from error


def probe(path: Path) -> VideoInfo:
    """Return what the container states about a video, without decoding.

    Args:
        path: Video file. The answer is kept until the file's size or modification time changes.

    Raises:
        UserError: Naming the file, for one that is missing, empty, no video, without
            presentation times, an AVI with B-frames, rotated by an oblique angle, or visibly cut
            short. A cut Matroska or MPEG-TS file looks like a shorter whole one, and is accepted
            as that.
    """
    if not path.is_file():
        raise UserError(f"{path}: is not there, expected a video file; correct the name")
    status = path.stat()
    return _probe(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _probe(path: Path, modified_nanoseconds: int, size_bytes: int) -> VideoInfo:
    """Probe once for each state of the file."""
    with opened_video(path) as (container, stream):
        start_seconds = max(0.0, (container.start_time or 0) / av.time_base)
        height, width = stream.height, stream.width
        rotation, is_mirrored = _orientation(path, stream)
        frames = _demux(path, container, stream)
        index_end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        if index_end > size_bytes:
            raise UserError(
                f"{path}: is cut short at {size_bytes} bytes, expected at least {index_end}; "
                "copy it again"
            )
        times = frames.timestamps * np.float64(stream.time_base) - start_seconds
        color_space = stream.codec_context.colorspace
    if not len(times) or not height or not width:
        raise UserError(f"{path}: holds no video frames, expected at least one; copy it again")
    for array in (times, frames.timestamps, frames.keyframes, frames.random_access_points):
        array.setflags(write=False)
    if rotation % 180:
        height, width = width, height
    return VideoInfo(
        path=path,
        times=times,
        timestamps=frames.timestamps,
        keyframes=frames.keyframes,
        random_access_points=frames.random_access_points,
        color_space=color_space,
        gpu_unsupported_reason=frames.gpu_unsupported_reason,
        height=height,
        width=width,
        rotation=rotation,
        is_mirrored=is_mirrored,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Frames:
    """What the packets of a stream state; fields as in `VideoInfo`."""

    timestamps: NDArray[np.int64]
    keyframes: NDArray[np.int64]
    random_access_points: NDArray[np.int64]
    gpu_unsupported_reason: str


def _demux(path: Path, container: InputContainer, stream: VideoStream) -> _Frames:
    """Read all packets and sort the frames that are shown by their times."""
    codec, extradata = stream.codec_context.name, bytes(stream.codec_context.extradata or b"")
    shown: dict[int, bool] = {}
    random_access: set[int] = set()
    num_packets = num_untimed = 0
    reason = stream_unsupported_reason(stream)
    description = None if reason else describe(stream)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UserError(f"{path}: is cut short or damaged inside a frame; copy it again")
        if packet.size == 0:
            continue
        num_packets += 1
        if description is not None and not reason:
            reason = packet_unsupported_reason(packet, description)
        # Packets flagged "discard" lie outside the edit list: decoded, but never shown.
        if packet.is_discard or _is_hidden(packet, stream):
            continue
        if packet.pts is None:
            num_untimed += 1
            continue
        shown[packet.pts] = shown.get(packet.pts, False) or packet.is_keyframe
        if packet.is_keyframe and is_random_access_point(codec, bytes(packet), extradata):
            random_access.add(packet.pts)
    if num_untimed:
        raise UserError(
            f"{path}: {num_untimed} of {num_untimed + len(shown)} frames have no presentation "
            "time, expected one on each; remux it (ffmpeg -fflags +genpts -i IN -c copy OUT.mp4)"
        )
    out_of_order = stream.codec_context.has_b_frames or len(shown) < num_packets
    if container.format.name == "avi" and out_of_order:
        raise UserError(
            f"{path}: is an AVI whose frames are not stored in the order of showing, expected "
            "another container, since AVI does not state that order; re-encode it, e.g. to MP4"
        )
    ordered = sorted(shown)
    keyframes = [index for index, timestamp in enumerate(ordered) if shown[timestamp]]
    points = [index for index in keyframes if ordered[index] in random_access]
    return _Frames(
        timestamps=np.array(ordered, dtype=np.int64),
        keyframes=np.array(keyframes, dtype=np.int64),
        random_access_points=np.array(points, dtype=np.int64),
        gpu_unsupported_reason=reason
        or timeline_unsupported_reason(points, len(ordered), num_packets),
    )


def _is_hidden(packet: "av.Packet[VideoStream]", stream: VideoStream) -> bool:
    """Return whether a packet is VP8's alternate reference frame, which is never shown."""
    return stream.codec_context.name in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the first video stream that is not a cover image."""
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if container.format.name.endswith("_pipe"):
        raise UserError(
            f"{path}: is a still image ({container.format.name}), expected a video; name it in a "
            "part of type 'image'"
        )
    if not streams:
        kinds = sorted({str(s.type) for s in container.streams}) or ["nothing"]
        raise UserError(
            f"{path}: holds {' and '.join(kinds)} but no video stream, expected a video; drop "
            "the sample"
        )
    if getattr(streams[0], "codec_context", None) is None:
        raise UserError(f"{path}: its video codec is unknown here; re-encode it, e.g. as H.264")
    return streams[0]


def _orientation(path: Path, stream: VideoStream) -> tuple[int, bool]:
    """Return (degrees counter-clockwise, whether mirrored) by the display matrix."""
    matrix = stream.codec_context.coded_side_data.get("display_matrix")
    if matrix is None:
        return 0, False
    # Nine native 32-bit numbers; a stored point (x, y), y down, is shown at (ax + cy, bx + dy).
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    is_mirrored = a * d - b * c < 0
    right = (-a, -b) if is_mirrored else (a, b)
    unit = max(abs(a), abs(b))
    rotations = {(unit, 0): 0, (0, -unit): 90, (-unit, 0): 180, (0, unit): 270}
    if unit == 0 or right not in rotations:
        raise UserError(
            f"{path}: is rotated by an oblique angle (display matrix {a}, {b}, {c}, {d}), "
            "expected a multiple of 90 degrees; re-encode it upright"
        )
    return rotations[right], is_mirrored
