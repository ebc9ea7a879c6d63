# SPDX-License-Identifier: Apache-2.0
"""What VP9 frames of profile 0 declare in their headers.

Source: VP9 Bitstream & Decoding Process Specification, 7.2 (uncompressed header) and annex B
(superframes).
"""

from megatron_keye.data.bitstream.bits import Bits
from megatron_keye.errors import UserError

_SUPERFRAME = 0b110
_RGB = 7
_SYNC_BITS = 24
_HEADER_BYTES = 24
"""Size and all that comes before it fit in."""


def shows_earlier_frame(packet: bytes) -> bool:
    """Return whether a packet shows a frame that was decoded before, and none of its own."""
    # The last frame is the one that is shown.
    header = _frames(packet)[-1][:1] or b"\0"
    # Two bits of marker, two of profile, in profile 3 a reserved one, then the flag.
    return bool(header[0] & (4 if header[0] >> 4 & 3 == 3 else 8))


def is_vp9_keyframe(packet: bytes) -> bool:
    """Return whether the first frame of a packet refers to no other, of any profile."""
    header = _frames(packet)[0][0]
    # Marker, profile, in profile 3 a reserved bit, whether a frame is shown again, not a keyframe.
    return (header >> 1 if header >> 4 & 3 == 3 else header >> 2) & 3 == 0


def has_size(packet: bytes, width: int, height: int) -> bool:
    """Return whether all sizes that a packet's frames declare, stored and shown, are this one.

    Frames without a size have that of frames before them.
    """
    try:
        sizes = [_sizes(Bits(frame[:_HEADER_BYTES])) for frame in _frames(packet)]
    except UserError:
        return False
    return all(size in (None, (width, height, width, height)) for size in sizes)


def _sizes(reader: Bits) -> tuple[int, int, int, int] | None:
    """Return a frame's stored and shown (width, height) where it declares them."""
    reader.read_u(4)
    if reader.read_u(1):
        return None
    is_predicted, is_shown, is_resilient = reader.read_u(1), reader.read_u(1), reader.read_u(1)
    if not is_predicted:
        reader.read_u(_SYNC_BITS)
        if reader.read_u(3) != _RGB:
            reader.read_u(1)
    else:
        is_intra = 0 if is_shown else reader.read_u(1)
        reader.read_u(0 if is_resilient else 2)
        reader.read_u(_SYNC_BITS if is_intra else 0)
        reader.read_u(8)
        if not is_intra:
            reader.read_u(3 * 4)
            if any(reader.read_u(1) for _ in range(3)):
                return None
    width, height = reader.read_u(16) + 1, reader.read_u(16) + 1
    if not reader.read_u(1):
        return width, height, width, height
    return width, height, reader.read_u(16) + 1, reader.read_u(16) + 1


def _frames(packet: bytes) -> list[bytes]:
    """Divide a packet into its frames, of which several share one that is shown."""
    marker = packet[-1]
    if marker >> 5 == _SUPERFRAME:
        num_frames, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
        index = len(packet) - 2 - num_frames * width
        if index >= 0 and packet[index] == marker:
            sizes = packet[index + 1 : -1]
            parts = [sizes[place : place + width] for place in range(0, len(sizes), width)]
            frames: list[bytes] = []
            start = 0
            for part in parts:
                stop = start + int.from_bytes(part, "little")
                frames.append(packet[start:stop])
                start = stop
            return frames
    return [packet]
