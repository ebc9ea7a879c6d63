"""What H.264 and HEVC frames declare in the headers of their NAL units, read without decoding.

A decoder on the GPU is given segments of a file, and counts the frames that it is given; both need
facts that containers state wrongly or not at all.
"""

from collections.abc import Sequence

_H264_IDR = 5
_H264_SLICES = range(1, 6)
SPS_TYPES = {"h264": 7, "hevc": 33}
"""Type of the NAL units that hold a sequence parameter set."""
_LENGTH_BYTE = {"h264": 4, "hevc": 21}
"""Place in a record of the byte that declares how long a NAL unit's length is."""
_HEVC_UNREFERENCED = range(0, 16, 2)
_HEVC_RANDOM_ACCESS = range(16, 22)
_HEVC_SLICES = range(32)


def is_random_access_point(codec: str, packet: bytes, extradata: bytes) -> bool:
    """Return whether decoding can start at a packet that its container calls a keyframe.

    H.264 must reset the decoder (IDR). HEVC may also be a clean random access frame, after which
    the frames shown before it are to be left out.

    Args:
        codec: "h264", "hevc" or "vp9", where every keyframe is one.
        packet: The whole packet.
        extradata: The stream's, which declares how NAL units are separated.
    """
    if codec == "h264":
        return _H264_IDR in (nal_type for nal_type, _ in _nal_units(codec, packet, extradata))
    if codec == "hevc":
        nal_types = [nal_type for nal_type, _ in _nal_units(codec, packet, extradata)]
        slices = [nal_type for nal_type in nal_types if nal_type in _HEVC_SLICES]
        return bool(slices) and slices[0] in _HEVC_RANDOM_ACCESS
    return True


def sps_nal_units(codec: str, packet: bytes, extradata: bytes) -> list[bytes]:
    """Return the sequence parameter sets in a packet.

    Args:
        codec: "h264" or "hevc".
        packet: The whole packet, or extradata that is no record but has start codes.
        extradata: As above.
    """
    return [
        packet[place].rstrip(b"\0")
        for nal_type, place in _nal_units(codec, packet, extradata)
        if nal_type == SPS_TYPES[codec]
    ]


def with_sps(codec: str, packet: bytes, extradata: bytes, sps: bytes) -> bytes:
    """Return a packet with another SPS in place of its own, and with start codes.

    Args:
        codec: "h264" or "hevc".
        packet: The whole packet.
        extradata: As above.
        sps: Without start code.
    """
    return b"".join(
        b"\0\0\1" + (sps if nal_type == SPS_TYPES[codec] else packet[place])
        for nal_type, place in _nal_units(codec, packet, extradata)
    )


def unreferenced_frames(codec: str, packets: Sequence[bytes], extradata: bytes) -> list[bool]:
    """Return which frames no other one of the packets refers to, as far as their headers declare.

    Args:
        codec: As above; VP9 declares nothing of the kind.
        packets: One for each frame.
        extradata: As above.

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
    if codec == "h264":
        headers = [
            packet[place.start]
            for nal_type, place in _nal_units(codec, packet, extradata)
            if nal_type in _H264_SLICES
        ]
        return 0, bool(headers) and not any(header & 0x60 for header in headers)
    if codec == "hevc":
        for nal_type, place in _nal_units(codec, packet, extradata):
            if nal_type in _HEVC_SLICES:
                return (packet[place.start + 1] & 7) - 1, nal_type in _HEVC_UNREFERENCED
    return 0, False


def _nal_units(codec: str, packet: bytes, extradata: bytes) -> list[tuple[int, slice]]:
    """Return type and place of each NAL unit of a packet, behind its length or start code.

    Args:
        codec: "h264" or "hevc".
        packet: The whole packet.
        extradata: Begins with 1 where NAL units follow their length, as in MP4 and Matroska.
    """
    places: list[slice] = []
    length_byte = _LENGTH_BYTE[codec]
    if extradata[:1] == b"\1" and len(extradata) > length_byte:
        width = (extradata[length_byte] & 3) + 1
        start = width
        while start < len(packet):
            stop = start + int.from_bytes(packet[start - width : start])
            places.append(slice(start, stop))
            start = stop + width
    else:
        start = packet.find(b"\0\0\1") + 3
        while 3 <= start < len(packet):
            following = packet.find(b"\0\0\1", start)
            places.append(slice(start, following if following >= 0 else len(packet)))
            start = following + 3
    return [(_nal_type(codec, packet[place.start]), place) for place in places]


def _nal_type(codec: str, header: int) -> int:
    return header & 31 if codec == "h264" else header >> 1 & 63
