"""What compressed frames say of themselves in their first bytes, read without decoding.

A decoder on the GPU is handed pieces of a file, and counts the frames that it is given; both need
facts that containers tell wrongly or not at all.
"""

from collections.abc import Mapping

_H264_IDR = 5
_H264_SLICES = range(1, 6)
SEQUENCE_PARAMETERS = {"h264": 7, "hevc": 33}
"""Kind of the units that hold a sequence parameter set."""
_LENGTH_BYTE = {"h264": 4, "hevc": 21}
"""Place in a record of the byte that tells how long a unit's length is."""
_HEVC_UNREFERENCED = range(0, 16, 2)
_HEVC_ENTRY = range(16, 22)
_HEVC_PICTURES = range(32)


def stands_alone(codec: str, packet: bytes, extradata: bytes) -> bool:
    """Tell whether decoding can start at a packet that its container calls a keyframe.

    H.264 must reset the decoder (IDR). HEVC may also be a clean random access picture, after which
    the frames shown before it are to be left out.

    Args:
        codec: "h264", "hevc" or "vp9", whose keyframes always stand alone.
        packet: The whole packet.
        extradata: The stream's, which tells how units are separated.
    """
    if codec == "h264":
        return _H264_IDR in (kind for kind, _ in _units(codec, packet, extradata))
    if codec == "hevc":
        kinds = [kind for kind, _ in _units(codec, packet, extradata)]
        pictures = [kind for kind in kinds if kind in _HEVC_PICTURES]
        return bool(pictures) and pictures[0] in _HEVC_ENTRY
    return True


def sequence_parameters(codec: str, packet: bytes, extradata: bytes) -> list[bytes]:
    """Return the sequence parameter sets that a packet brings.

    Args:
        codec: "h264" or "hevc".
        packet: The whole packet, or extradata that is no record but units behind start codes.
        extradata: As above.
    """
    return [
        packet[place].rstrip(b"\0")
        for kind, place in _units(codec, packet, extradata)
        if kind == SEQUENCE_PARAMETERS[codec]
    ]


def with_sequence_parameters(
    codec: str, packet: bytes, extradata: bytes, replacements: Mapping[bytes, bytes]
) -> bytes:
    """Return a packet with sequence parameter sets replaced.

    Args:
        codec: "h264" or "hevc".
        packet: As in `sequence_parameters`.
        extradata: As above.
        replacements: New set by old one; sets that are not in it stay.
    """
    width = _length_width(codec, extradata)
    parts: list[bytes] = []
    done = 0
    for kind, place in _units(codec, packet, extradata):
        unit = packet[place].rstrip(b"\0")
        if kind != SEQUENCE_PARAMETERS[codec] or unit not in replacements:
            continue
        new = replacements[unit]
        length = len(new).to_bytes(width, "big") if width else b""
        parts += [packet[done : place.start - width], length, new]
        done = place.stop
    return b"".join(parts) + packet[done:]


def layer_if_unreferenced(codec: str, packet: bytes, extradata: bytes) -> tuple[int, bool]:
    """Return a frame's temporal layer, and whether no frame of that layer or a lower one needs it.

    Such a frame may be left out where no higher layer is there. VP9 tells nothing of the kind at
    its front.

    Source: ITU-T H.264, 7.4.1 (nal_ref_idc); ITU-T H.265, 7.4.2.2 (sub-layer non-reference
    pictures). Arguments as above.
    """
    if codec == "h264":
        units = _units(codec, packet, extradata)
        slices = [packet[place.start] for kind, place in units if kind in _H264_SLICES]
        return 0, bool(slices) and not any(header & 0x60 for header in slices)
    if codec == "hevc":
        for kind, place in _units(codec, packet, extradata):
            if kind in _HEVC_PICTURES:
                return (packet[place.start + 1] & 7) - 1, kind in _HEVC_UNREFERENCED
    return 0, False


def _units(codec: str, packet: bytes, extradata: bytes) -> list[tuple[int, slice]]:
    """Return kind and place of each unit of a packet, behind its length or start code.

    Args:
        codec: "h264" or "hevc".
        packet: The whole packet.
        extradata: Begins with 1 where units come after their length, as in MP4 and Matroska.
    """
    width = _length_width(codec, extradata)
    places: list[slice] = []
    if width:
        start = width
        while start < len(packet):
            stop = start + int.from_bytes(packet[start - width : start], "big")
            places.append(slice(start, stop))
            start = stop + width
    else:
        start = packet.find(b"\0\0\1") + 3
        while 3 <= start < len(packet):
            following = packet.find(b"\0\0\1", start)
            places.append(slice(start, following if following >= 0 else len(packet)))
            start = following + 3
    return [(_kind(codec, packet[place.start]), place) for place in places]


def _length_width(codec: str, extradata: bytes) -> int:
    """Return how many bytes tell a unit's length, 0 where units come behind start codes."""
    length_byte = _LENGTH_BYTE[codec]
    if extradata[:1] != b"\1" or len(extradata) <= length_byte:
        return 0
    return (extradata[length_byte] & 3) + 1


def _kind(codec: str, header: int) -> int:
    return header & 31 if codec == "h264" else header >> 1 & 63
