# SPDX-License-Identifier: Apache-2.0
"""Reads a video's packets, once and without decoding, for its frames, times and entry points.

Everything is planned and decoded from this. The container's average rate, which is wrong in real
files, is never read, and what would be shown otherwise than it is stored is refused here.
"""

from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from megatron_keye.data.bitstream.description import describe
from megatron_keye.data.reading import reading
from megatron_keye.data.video.container import opened_video, orientation
from megatron_keye.data.video.gpu_rules import (
    packet_unsupported_reason,
    stream_unsupported_reason,
    timeline_unsupported_reason,
)
from megatron_keye.data.video.packet_list import PacketList
from megatron_keye.data.video.timeline import Timeline, make_timeline
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError

_KEPT = 16
"""Files of which the answer is kept; that of two hours takes about 5 MB."""


def probe(path: Path) -> VideoInfo:
    """Return what a video holds, without decoding.

    Args:
        path: Video file. The answer is kept until the file's size or modification time changes.

    Raises:
        UserError: Naming the file, for one that is missing, empty, no video, without
            presentation times or with some that start again, without a frame where decoding can
            begin, in a container that hides the order of its frames, rotated by an oblique
            angle, or visibly cut short. A cut Matroska or MPEG-TS file looks like a shorter
            whole one, and is accepted as that.
    """
    with reading(path, "a video file"):
        status = path.stat()
    return _probe(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=_KEPT)
def _probe(path: Path, modified_nanoseconds: int, size_bytes: int) -> VideoInfo:
    """Probe once for each state of the file."""
    with opened_video(path) as (container, stream):
        start_seconds = max(0.0, (container.start_time or 0) / av.time_base)
        height, width = stream.height, stream.width
        rotation, is_mirrored = orientation(path, stream)
        packets, gpu_reason = _demux(container, stream)
        index_end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        if index_end > size_bytes:
            raise UserError(
                f"{path}: is cut short at {size_bytes} bytes, expected at least {index_end}; "
                "copy it again"
            )
        if not packets.sizes:
            raise UserError(f"{path}: holds no video frames, expected at least one; copy it again")
        if not height or not width:
            raise UserError(
                f"{path}: lacks the headers that state the size of its frames, as where a "
                "recording was cut, expected them in front; cut the whole recording again"
            )
        timeline = make_timeline(path, container, stream, packets)
        time_base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
        color_space = stream.codec_context.colorspace
    if rotation % 180:
        height, width = width, height
    return VideoInfo(
        path=path,
        time_base=time_base,
        # A frame that is shown before the container's start begins the video.
        start_seconds=min(start_seconds, float(timeline.timestamps[0] * np.float64(time_base))),
        color_space=color_space,
        gpu_unsupported_reason=gpu_reason or _timeline_reason(timeline),
        height=height,
        width=width,
        rotation=rotation,
        is_mirrored=is_mirrored,
        **vars(timeline),
    )


def _demux(container: InputContainer, stream: VideoStream) -> tuple[PacketList, str]:
    """Read all packets, and return them with what keeps them from the GPU, "" if nothing does."""
    reason = stream_unsupported_reason(stream)
    description = None if reason else describe(stream)
    packets = PacketList(stream)
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        content = packets.add(packet)
        if description is not None and not reason:
            reason = packet_unsupported_reason(packet, content, description)
    return packets, reason


def _timeline_reason(timeline: Timeline) -> str:
    """Return why the order of frames keeps a stream from the GPU, "" if it does not."""
    frames = timeline.packet_frames
    points = frames[timeline.entries.packets[timeline.entries.resets == 1]]
    return timeline_unsupported_reason(points.tolist(), len(timeline.timestamps), len(frames))
