"""What H.264 and HEVC frames declare in the headers of their NAL units, read without decoding.

A decoder on the GPU is given segments of a file, and counts the frames that it is given; both need
facts that containers state wrongly or not at all.
"""

from collections.abc import Sequence

SPS_TYPES = {"h264": 7, "hevc": 33}
"""Type of the NAL units that hold a sequence parameter set."""
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
    length_byte = _LENGTH_BYTE[codec]
    if extradata[:1] != b"\1" or len(extradata) <= length_byte:
        nal_units = packet.split(b"\0\0\1")[1:]
    else:
        nal_units = []
        width = (extradata[length_byte] & 3) + 1
        start = width
        while start < len(packet):
            stop = start + int.from_bytes(packet[start - width : start])
            nal_units.append(packet[start:stop])
            start = stop + width
    return [stripped for nal_unit in nal_units if (stripped := nal_unit.rstrip(b"\0"))]


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
        return _H264_IDR in (nal_type(codec, nal_unit) for nal_unit in slices)
    return bool(slices) and nal_type(codec, slices[0]) in _HEVC_RANDOM_ACCESS


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
        return 0, not any(nal_unit[0] & 0x60 for nal_unit in slices)
    layer = (int.from_bytes(slices[0][:2]) & 7) - 1
    return layer, nal_type(codec, slices[0]) in _HEVC_UNREFERENCED


def _slices(codec: str, packet: bytes, extradata: bytes) -> list[bytes]:
    nal_units = split_nal_units(codec, packet, extradata)
    return [nal_unit for nal_unit in nal_units if nal_type(codec, nal_unit) in _SLICES[codec]]
