# SPDX-License-Identifier: Apache-2.0
"""Opens a video file: which of its streams is the video, and which way up it is shown."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from megatron_keye.data.reading import reading
from megatron_keye.errors import UserError

_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails


@contextmanager
def opened_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the best video stream of a file; packets of its other streams are left out.

    Args:
        path: Video file.

    Returns:
        Container and stream, closed on leaving.

    Raises:
        UserError: Naming the file: missing, empty, no container, no video in it; also for what
            FFmpeg raises inside the `with` block.
    """
    with reading(path, "a video file"):
        size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise UserError(f"{path}: has 0 bytes, expected a video file; copy it again")
    try:
        with av.open(str(path)) as container:
            video = _video_stream(path, container)
            for stream in container.streams:
                if stream is not video:
                    stream.discard = Discard.all
            yield container, video
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: cannot be read as a video ({error.strerror}), expected a whole, undamaged "
            "video file; copy it again or drop the sample"
        ) from error


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the video stream that players show: by default, then by size, then the first."""
    if container.format.name.endswith("_pipe"):
        raise UserError(
            f"{path}: is a still image ({container.format.name}), expected a video; name it in a "
            "part of type 'image'"
        )
    streams = [s for s in container.streams.video if not s.disposition & _NO_VIDEO]
    if not streams:
        kinds = sorted({str(s.type) for s in container.streams}) or ["nothing"]
        raise UserError(
            f"{path}: holds {' and '.join(kinds)} but no video stream, expected a video; drop "
            "the sample"
        )
    known = [s for s in streams if getattr(s, "codec_context", None) is not None]
    if not known:
        raise UserError(f"{path}: its video codec is unknown here; re-encode it, e.g. as H.264")
    # The order of FFmpeg's own choice; max() takes the first of equals.
    return max(
        known, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height)
    )


def orientation(path: Path, stream: VideoStream) -> tuple[int, bool]:
    """Return (degrees counter-clockwise, whether mirrored) by the display matrix.

    Raises:
        UserError: Naming the file, for an oblique angle.
    """
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
