"""What compressed frames say of themselves in their first bytes, read without decoding.

A decoder on the GPU is handed pieces of a file, and counts the frames that it is given; both need
facts that containers tell wrongly or not at all.
"""

_H264_IDR = 5
_H264_PARAMETERS = 7
_H264_SLICES = range(1, 6)
_HEVC_UNREFERENCED = range(0, 16, 2)
_HEVC_ENTRY = range(16, 22)
_HEVC_PICTURES = range(32)
_VP9_SUPERFRAME = 0b110


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
        return any(packet[start] & 31 == _H264_IDR for start in _units(packet, extradata, 4))
    if codec == "hevc":
        kinds = [packet[start] >> 1 & 63 for start in _units(packet, extradata, 21)]
        pictures = [kind for kind in kinds if kind in _HEVC_PICTURES]
        return bool(pictures) and pictures[0] in _HEVC_ENTRY
    return True


def holds_parameters(packet: bytes, extradata: bytes) -> bool:
    """Tell whether an H.264 packet brings a sequence parameter set; arguments as above."""
    return any(packet[start] & 31 == _H264_PARAMETERS for start in _units(packet, extradata, 4))


def layer_if_unreferenced(codec: str, packet: bytes, extradata: bytes) -> tuple[int, bool]:
    """Return a frame's temporal layer, and whether no frame of that layer or a lower one needs it.

    Such a frame may be left out where no higher layer is there. VP9 tells nothing of the kind at
    its front.

    Source: ITU-T H.264, 7.4.1 (nal_ref_idc); ITU-T H.265, 7.4.2.2 (sub-layer non-reference
    pictures). Arguments as above.
    """
    if codec == "h264":
        slices = [u for u in _units(packet, extradata, 4) if packet[u] & 31 in _H264_SLICES]
        return 0, bool(slices) and not any(packet[start] & 0x60 for start in slices)
    if codec == "hevc":
        for start in _units(packet, extradata, 21):
            kind = packet[start] >> 1 & 63
            if kind in _HEVC_PICTURES:
                return (packet[start + 1] & 7) - 1, kind in _HEVC_UNREFERENCED
    return 0, False


def shows_earlier_frame(packet: bytes) -> bool:
    """Tell whether a VP9 packet shows a frame that was decoded before, and none of its own."""
    start = 0
    marker = packet[-1]
    if marker >> 5 == _VP9_SUPERFRAME:
        num_frames, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
        index = len(packet) - 2 - num_frames * width
        if index >= 0 and packet[index] == marker:
            sizes = packet[index + 1 : -1]
            parts = [sizes[place : place + width] for place in range(0, len(sizes), width)]
            # The last frame is the one that is shown.
            start = sum(int.from_bytes(part, "little") for part in parts[:-1])
    header = packet[start] if start < len(packet) else 0
    # Two bits of marker, two of profile, in profile 3 a reserved one, then the flag.
    return bool(header & (4 if header >> 4 & 3 == 3 else 8))


def _units(packet: bytes, extradata: bytes, length_byte: int) -> list[int]:
    """Return where the units of an H.264 or HEVC packet start, behind length or start code.

    Args:
        packet: The whole packet.
        extradata: Begins with 1 where units come after their length, as in MP4 and Matroska.
        length_byte: Place in the extradata of the byte that tells how long a length is.
    """
    starts: list[int] = []
    if extradata[:1] == b"\1" and len(extradata) > length_byte:
        width = (extradata[length_byte] & 3) + 1
        place = 0
        while place + width < len(packet):
            starts.append(place + width)
            place += width + int.from_bytes(packet[place : place + width], "big")
        return starts
    place = packet.find(b"\0\0\1")
    while 0 <= place < len(packet) - 3:
        starts.append(place + 3)
        place = packet.find(b"\0\0\1", place + 3)
    return starts
