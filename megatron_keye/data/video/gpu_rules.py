# SPDX-License-Identifier: Apache-2.0
"""Which videos a GPU decodes exactly; all others are decoded on the CPU, and the log says why.

The decoder behind DALI returns wrong frames rather than an error in each case that is excluded
here: it pairs frames with times by counting, converts colours by one rule, assumes progressive
8-bit frames of even size, and reads the wrong rows of cropped frames.
"""

from collections.abc import Sequence

import av
from av.video.stream import VideoStream

from megatron_keye.data.bitstream.description import Description, describe
from megatron_keye.data.bitstream.vp9 import has_size, shows_earlier_frame
from megatron_keye.errors import UserError

CODECS = ("h264", "hevc", "vp9")
PIXEL_FORMATS = ("yuv420p", "yuvj420p")
COLOR_SPACES = {1: "BT.709", 2: "unspecified", 5: "BT.601 (625 lines)", 6: "BT.601 (525 lines)"}
"""By FFmpeg's number; unspecified ones are converted as BT.601, as FFmpeg does."""
SIDES = range(144, 4097, 2)
"""Sizes that the decoders of all three codecs take, on the oldest GPUs that matter here."""
VP9_STEP = 8
"""VP9 stores whole blocks of so many pixels a side, and does not declare cropping."""
HEVC_STEP = 16
"""The GPU rounds HEVC's stored size up to so many pixels a side; DALI then reads wrong rows."""
MAX_FRAMES_BETWEEN_ACCESS_POINTS = 1500
"""Each segment is decoded from the random access point before it."""

_PROGRESSIVE = (0, 1)


def stream_unsupported_reason(stream: VideoStream) -> str:
    """Return why the stream's description keeps it from the GPU, "" if it does not."""
    context = stream.codec_context
    if context.name not in CODECS:
        return f"its codec is {context.name}, expected one of {', '.join(CODECS)}"
    if context.pix_fmt not in PIXEL_FORMATS:
        return f"its pixels are {context.pix_fmt}, expected one of {', '.join(PIXEL_FORMATS)}"
    if context.field_order not in _PROGRESSIVE:
        return "it is interlaced"
    if context.colorspace not in COLOR_SPACES:
        return f"its colour space is FFmpeg's {context.colorspace}, expected one of {COLOR_SPACES}"
    if not (context.height in SIDES and context.width in SIDES):
        return (
            f"it has {context.width} x {context.height} pixels, expected even sides of "
            f"{SIDES[0]} to {SIDES[-1]}"
        )
    if context.name == "vp9" and (context.height % VP9_STEP or context.width % VP9_STEP):
        return (
            f"it has {context.width} x {context.height} pixels, expected multiples of {VP9_STEP}"
        )
    try:
        sps = describe(stream).sps
    except UserError as error:
        return str(error)
    if context.name == "hevc" and sps is not None:
        width, height = sps.stored_width, sps.stored_height
        if height % HEVC_STEP or width % HEVC_STEP:
            return f"it stores {width} x {height} pixels, expected multiples of {HEVC_STEP}"
    return ""


def packet_unsupported_reason(
    packet: "av.Packet[VideoStream]", content: bytes, description: Description
) -> str:
    """Return why a packet keeps its stream from the GPU, "" if it does not.

    Args:
        packet: Any packet.
        content: Its bytes.
        description: Its stream's.
    """
    if packet.has_sidedata("new_extradata"):
        announced = bytes(packet.get_sidedata("new_extradata"))
        if announced != description.extradata:
            return "its parameters change inside"
    if description.codec == "vp9":
        if shows_earlier_frame(content):
            return "it shows frames again that were decoded earlier"
        if not has_size(content, packet.stream.width, packet.stream.height):
            return "its frames have other sizes than its container, or several"
    return description.unsupported_reason(content)


def timeline_unsupported_reason(
    random_access_points: Sequence[int], num_frames: int, num_packets: int
) -> str:
    """Return why the order of frames keeps a stream from the GPU, "" if it does not.

    Args:
        random_access_points: As in `VideoInfo`.
        num_frames: Frames that are shown.
        num_packets: Packets in the stream, whether shown or not.
    """
    if num_frames != num_packets:
        return f"it has {num_packets} packets for {num_frames} frames that are shown"
    if not random_access_points or random_access_points[0] != 0:
        return "its first frame does not stand alone"
    ends = [*random_access_points[1:], num_frames]
    longest = max(end - start for start, end in zip(random_access_points, ends, strict=True))
    if longest > MAX_FRAMES_BETWEEN_ACCESS_POINTS:
        return (
            f"it can't be entered within {longest} frames, expected an random access point within "
            f"{MAX_FRAMES_BETWEEN_ACCESS_POINTS}"
        )
    return ""
