"""The cropping of H.264 pictures, taken out of a stream's description.

H.264 stores whole macroblocks of 16 x 16, so 1080 rows are 1088 of which the last eight are
cropped. DALI keeps decoders by the cropped size and looks for them by the stored one, and so makes
a new one for each piece of such a file, which takes as long as decoding 90 frames. A stream that
says nothing of cropping is decoded alike; the frames are cropped afterwards.

Source: ITU-T H.264, 7.3.2.1.1 (sequence parameter set) and 7.4.1.1 (emulation prevention);
ISO/IEC 14496-15, 5.3.3.1 (AVCDecoderConfigurationRecord).
"""

from dataclasses import dataclass

_MACROBLOCK = 16
_WITH_CHROMA_FORMAT = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)
_SET_START = 6
"""Bytes of the record in front of its first parameter set, of which there is one usually."""


@dataclass(frozen=True, kw_only=True)
class Uncropped:
    """A stream's description without cropping."""

    extradata: bytes
    """The record that goes into a container instead of the old one."""
    height: int
    """Rows that are stored."""
    width: int
    """Columns that are stored."""


def uncrop(extradata: bytes) -> Uncropped | None:
    """Return the description of the same stream with its pictures as they are stored.

    Args:
        extradata: As MP4 and Matroska keep it, for H.264.

    Returns:
        None where there is nothing to take out, where cropping is not only at the right and at
        the bottom, and for what is not such a record with one sequence parameter set.
    """
    if extradata[:1] != b"\1" or len(extradata) <= _SET_START + 2 or extradata[5] & 31 != 1:
        return None
    start = _SET_START + 2
    end = start + int.from_bytes(extradata[_SET_START:start], "big")
    try:
        found = _without_cropping(extradata[start:end])
    except IndexError:
        return None
    if found is None:
        return None
    parameters, height, width = found
    length = len(parameters).to_bytes(2, "big")
    return Uncropped(
        extradata=extradata[:_SET_START] + length + parameters + extradata[end:],
        height=height,
        width=width,
    )


def _without_cropping(parameters: bytes) -> tuple[bytes, int, int] | None:
    """Return (sequence parameter set, height, width) without cropping, None as `uncrop`."""
    # A 3 behind two zeros is no content: it keeps start codes out of units.
    reader = _Bits(parameters[1:].replace(b"\0\0\3", b"\0\0"))
    profile = reader.number(8)
    reader.number(16)
    reader.golomb()
    if profile in _WITH_CHROMA_FORMAT:
        _skip_chroma_format(reader)
    reader.golomb()
    _skip_picture_order(reader)
    reader.golomb()
    reader.number(1)
    width, height = (_MACROBLOCK * (reader.golomb() + 1) for _ in range(2))
    if not reader.number(1):
        return None  # Fields, which do not go to the GPU either.
    reader.number(1)
    flag = reader.place
    if not reader.number(1):
        return None
    left, _, top, _ = (reader.golomb() for _ in range(4))
    if left or top:
        return None
    kept = reader.bits[:flag] + "0" + reader.bits[reader.place : reader.bits.rindex("1") + 1]
    kept += "0" * (-len(kept) % 8)
    content = int(kept, 2).to_bytes(len(kept) // 8, "big")
    return parameters[:1] + _guarded(content), height, width


def _skip_chroma_format(reader: "_Bits") -> None:
    """Read past what the higher profiles say of samples and scaling."""
    chroma_format = reader.golomb()
    if chroma_format == 3:
        reader.number(1)
    reader.golomb()
    reader.golomb()
    reader.number(1)
    if reader.number(1):
        for matrix in range(8 if chroma_format != 3 else 12):
            if reader.number(1):
                _skip_scaling_list(reader, 16 if matrix < 6 else 64)


def _skip_scaling_list(reader: "_Bits", size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + reader.signed_golomb()) % 256
        last = following or last


def _skip_picture_order(reader: "_Bits") -> None:
    kind = reader.golomb()
    if kind == 0:
        reader.golomb()
    elif kind == 1:
        reader.number(1)
        reader.golomb()
        reader.golomb()
        for _ in range(reader.golomb()):
            reader.golomb()


def _guarded(content: bytes) -> bytes:
    """Put a 3 behind two zeros wherever a byte up to 3 follows."""
    guarded = bytearray()
    zeros = 0
    for byte in content:
        if zeros == 2 and byte <= 3:
            guarded.append(3)
            zeros = 0
        guarded.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(guarded)


class _Bits:
    """Reads bits, most significant first; running past the end raises IndexError."""

    def __init__(self, content: bytes) -> None:
        self.bits = "".join(f"{byte:08b}" for byte in content)
        self.place = 0

    def number(self, width: int) -> int:
        """Read an unsigned number of `width` bits."""
        if self.place + width > len(self.bits):
            raise IndexError("the parameter set ends early")
        self.place += width
        return int(self.bits[self.place - width : self.place], 2)

    def golomb(self) -> int:
        """Read an unsigned Exp-Golomb number."""
        zeros = self.bits.find("1", self.place) - self.place
        if zeros < 0:
            raise IndexError("the parameter set ends early")
        self.place += zeros
        return self.number(zeros + 1) - 1

    def signed_golomb(self) -> int:
        """Read a signed Exp-Golomb number: 0, 1, -1, 2, ..."""
        code = self.golomb()
        return (code + 1) // 2 if code % 2 else -(code // 2)
