# SPDX-License-Identifier: Apache-2.0
"""What H.264 and HEVC frames declare in the headers of their NAL units, read without decoding.

Where decoding can start, and which frames no other needs, are facts that containers state wrongly
or not at all.
"""

from collections.abc import Iterator, Sequence

SPS_TYPES = {"h264": 7, "hevc": 33}
"""Type of the NAL units that hold a sequence parameter set."""
PARAMETER_SET_TYPES = {"h264": range(7, 9), "hevc": range(32, 35)}
"""Types of the NAL units that hold parameter sets of any kind."""
_LENGTH_BYTE = {"h264": 4, "hevc": 21}
"""Place in a record of the byte that declares how long a NAL unit's length is."""
_SLICES = {"h264": range(1, 6), "hevc": range(32)}
_H264_IDR = 5
_HEVC_RANDOM_ACCESS = range(16, 22)
_HEVC_UNREFERENCED = range(0, 16, 2)


def split_nal_units(codec: str, packet: bytes, extradata: bytes) -> list[bytes]:
    """Return a packet's NAL units, without start codes or lengths.

    Args:
        codec: "h264" or "hevc".
        packet: The whole packet, or extradata that is no record but has start codes.
        extradata: The stream's. Begins with 1 where lengths separate NAL units, as in MP4 and
            Matroska.
    """
    nal_units = (packet[start:stop] for start, stop in _spans(codec, packet, extradata))
    return [stripped for nal_unit in nal_units if (stripped := nal_unit.rstrip(b"\0"))]


def nal_units_of(types: Sequence[int], codec: str, packet: bytes, extradata: bytes) -> list[bytes]:
    """Return those of a packet's NAL units that have one of these types, copying no other."""
    return [
        packet[start:stop].rstrip(b"\0")
        for start, stop in _spans(codec, packet, extradata)
        if start < stop and nal_type(codec, packet[start : start + 1]) in types
    ]


def length_bytes(codec: str, extradata: bytes) -> int:
    """Return how many bytes hold the length of a NAL unit, 0 where start codes separate them."""
    place = _LENGTH_BYTE[codec]
    return (extradata[place] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > place else 0


def _spans(codec: str, packet: bytes, extradata: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each NAL unit of a packet starts and stops."""
    if width := length_bytes(codec, extradata):
        start = width
        while start < len(packet):
            stop = start + int.from_bytes(packet[start - width : start])
            yield start, min(stop, len(packet))
            start = stop + width
        return
    start = packet.find(b"\0\0\1")
    while start >= 0:
        following = packet.find(b"\0\0\1", start + 3)
        yield start + 3, following if following >= 0 else len(packet)
        start = following


def nal_type(codec: str, nal_unit: bytes) -> int:
    """Return the type in a NAL unit's header."""
    return nal_unit[0] & 31 if codec == "h264" else nal_unit[0] >> 1 & 63


def is_random_access_point(codec: str, packet: bytes, extradata: bytes) -> bool:
    """Return whether decoding can start at a packet that its container calls a keyframe.

    H.264 must reset the decoder (IDR). HEVC may also be a clean random access frame, after which
    the frames shown before it are to be left out.

    Args:
        codec: "h264", "hevc" or "vp9", where every keyframe is one.
        packet: The whole packet.
        extradata: The stream's.
    """
    if codec not in SPS_TYPES:
        return True
    slices = _slices(codec, packet, extradata)
    if codec == "h264":
        return _H264_IDR in (nal_type(codec, head) for head in slices)
    return bool(slices) and nal_type(codec, slices[0]) in _HEVC_RANDOM_ACCESS


def is_h264_reference(packet: bytes, extradata: bytes) -> bool:
    """Return whether other frames of H.264 may refer to this one."""
    return any(head[0] & 0x60 for head in _slices("h264", packet, extradata))


def unreferenced_frames(codec: str, packets: Sequence[bytes], extradata: bytes) -> list[bool]:
    """Return which frames no other one of the packets refers to, as far as their headers declare.

    Args:
        codec: As above; VP9 declares nothing of the kind.
        packets: One for each frame.
        extradata: The stream's.

    Source: ITU-T H.264, 7.4.1 (nal_ref_idc); ITU-T H.265, 7.4.2.2 (sub-layer non-reference
    pictures).
    """
    frames = [_layer_if_unreferenced(codec, packet, extradata) for packet in packets]
    # Frames of higher temporal layers may refer to HEVC's sub-layer non-reference pictures, which
    # FFmpeg's filter_units=discard=nonref drops in every layer.
    highest = max((layer for layer, _ in frames), default=0)
    return [frame == (highest, True) for frame in frames]


def _layer_if_unreferenced(codec: str, packet: bytes, extradata: bytes) -> tuple[int, bool]:
    """Return a frame's temporal layer, and whether no frame up to that layer refers to it."""
    slices = _slices(codec, packet, extradata) if codec in SPS_TYPES else []
    if not slices:
        return 0, False
    if codec == "h264":
        return 0, not any(head[0] & 0x60 for head in slices)
    layer = (int.from_bytes(slices[0][:2]) & 7) - 1
    return layer, nal_type(codec, slices[0]) in _HEVC_UNREFERENCED


def _slices(codec: str, packet: bytes, extradata: bytes) -> list[bytes]:
    """Return the headers of a packet's slices."""
    heads = (packet[start : start + 2] for start, _ in _spans(codec, packet, extradata))
    return [head for head in heads if head and nal_type(codec, head) in _SLICES[codec]]
