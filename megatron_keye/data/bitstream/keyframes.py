# SPDX-License-Identifier: Apache-2.0
"""Whether decoding can begin at a packet that its container calls a keyframe, by its own bits.

Containers flag what their muxer believed. A codec that is not listed here begins at its first
packet alone: decoded from the top, every file is what its author sees.
"""

from collections.abc import Callable

from megatron_keye.data.bitstream.bits import Bits
from megatron_keye.data.bitstream.nal_units import is_random_access_point, nal_units_of
from megatron_keye.data.bitstream.vp9 import is_vp9_keyframe
from megatron_keye.errors import UserError

_H264_SEI = (6,)
_RECOVERY_POINT = 6
_SEI_BYTES = 512
"""Recovery points stand in front of what captions and encoders add."""
_HEADER_BYTES = 16
_MPEG_INTRA = 1
_AV1_FRAME_HEADERS = (3, 6)


def recovery_frames(codec: str, packet: bytes, extradata: bytes) -> int | None:
    """Return after how many reference frames a decoder that begins here decodes exactly.

    Args:
        codec: FFmpeg's name, of the codec rather than of a decoder.
        packet: A whole packet that its container calls a keyframe.
        extradata: The stream's.

    Returns:
        0 at once; more for H.264 that refreshes its picture piece by piece; None never.
    """
    if codec in ("h264", "hevc"):
        if is_random_access_point(codec, packet, extradata):
            return 0
        return _h264_recovery(packet, extradata) if codec == "h264" else None
    try:
        return 0 if codec in _CHECKS and _CHECKS[codec](packet) else None
    except (UserError, IndexError):
        return None


def _h264_recovery(packet: bytes, extradata: bytes) -> int | None:
    """Read a recovery point that promises exact frames.

    Source: ITU-T H.264, D.1.8 and D.2.8 (recovery point SEI message), 7.3.2.3.1 (SEI message).
    """
    for nal_unit in nal_units_of(_H264_SEI, "h264", packet, extradata):
        content = nal_unit[1:_SEI_BYTES].replace(b"\0\0\3", b"\0\0")
        place = 0
        while place + 2 < len(content):
            kind, place = _read_number(content, place)
            size, place = _read_number(content, place)
            if kind == _RECOVERY_POINT:
                reader = Bits(content[place : place + size])
                try:
                    num_frames, is_exact = reader.read_ue(), reader.read_u(1)
                except UserError:
                    return None
                return num_frames if is_exact else None
            place += size
    return None


def _read_number(content: bytes, place: int) -> tuple[int, int]:
    """Read a number of an SEI message, a sum of bytes up to one below 255, and where it ends."""
    total = 0
    while place < len(content) and content[place] == 255:
        total, place = total + 255, place + 1
    return (total + content[place] if place < len(content) else total), place + 1


def _is_mpeg_keyframe(packet: bytes) -> bool:
    """Source: ISO/IEC 13818-2, 6.2.2.1 (sequence header) and 6.3.9 (picture header)."""
    picture = packet.find(b"\0\0\1\0")
    has_sequence = packet.find(b"\0\0\1\xb3", 0, max(0, picture)) >= 0
    return has_sequence and packet[picture + 5] >> 3 & 7 == _MPEG_INTRA


def _is_mpeg4_keyframe(packet: bytes) -> bool:
    """Source: ISO/IEC 14496-2, 6.3.5 (video object plane)."""
    plane = packet.find(b"\0\0\1\xb6")
    return plane >= 0 and packet[plane + 4] >> 6 == 0


def _is_h263_keyframe(packet: bytes) -> bool:
    """Source: ITU-T H.263, 5.1 (picture layer)."""
    reader = Bits(packet[:_HEADER_BYTES])
    reader.read_u(22 + 8 + 5)
    if (source_format := reader.read_u(3)) != 7:
        return source_format != 0 and reader.read_u(1) == 0
    if reader.read_u(3) == 1:
        reader.read_u(18)
    return reader.read_u(3) == 0


def _is_flv1_keyframe(packet: bytes) -> bool:
    """Sorenson's H.263. Source: Adobe Flash Video File Format 10.1, E.4.3.2 (H263VIDEOPACKET)."""
    reader = Bits(packet[:_HEADER_BYTES])
    reader.read_u(17 + 5 + 8)
    reader.read_u({0: 16, 1: 32}.get(reader.read_u(3), 0))
    return reader.read_u(2) == 0


def _is_av1_keyframe(packet: bytes) -> bool:
    """Whether the first frame is a keyframe that is shown.

    Source: AV1 Bitstream & Decoding Process Specification, 5.3 (OBU) and 5.9.2 (frame header).
    """
    place = 0
    while place < len(packet):
        header = packet[place]
        place += 2 if header & 4 else 1
        size, shift = 0, 0
        while header & 2:
            size |= (packet[place] & 127) << shift
            place, shift = place + 1, shift + 7
            if packet[place - 1] < 128:
                break
        if header >> 3 & 15 in _AV1_FRAME_HEADERS:
            # Not one that is shown again, of type 0, and shown.
            return packet[place] >> 4 == 1
        place += size if header & 2 else len(packet)
    return False


_CHECKS: dict[str, Callable[[bytes], bool]] = {
    "mpeg1video": _is_mpeg_keyframe,
    "mpeg2video": _is_mpeg_keyframe,
    "mpeg4": _is_mpeg4_keyframe,
    "h263": _is_h263_keyframe,
    "flv1": _is_flv1_keyframe,
    "vp8": lambda packet: packet[0] & 1 == 0,
    "vp9": is_vp9_keyframe,
    "av1": _is_av1_keyframe,
    "theora": lambda packet: packet[0] >> 6 == 0,
    "msmpeg4v2": lambda packet: packet[0] >> 6 == 0,
    "msmpeg4v3": lambda packet: packet[0] >> 6 == 0,
    "wmv1": lambda packet: packet[0] >> 6 == 0,
    "wmv2": lambda packet: packet[0] >> 7 == 0,
    # The first bit of a range coder that begins with even chances.
    "ffv1": lambda packet: int.from_bytes(packet[:2]) >= 0x7F80,
    # Their headers depend on much else, or are not public, so the container is believed.
    "vc1": lambda packet: True,
    "wmv3": lambda packet: True,
    "png": lambda packet: True,
}


def can_check(codec: str) -> bool:
    """Return whether `recovery_frames` knows the keyframes of a codec."""
    return codec in _CHECKS or codec in ("h264", "hevc")
