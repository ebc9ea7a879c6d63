"""Sizes and cropping of H.264 and HEVC pictures: read, and taken out of what a stream says.

Both store whole blocks, so that 1080 rows are often 1088 of which the last eight are cropped. DALI
takes a decoder that it kept from another stream by the size that is stored, not by the one that is
shown, and then looks for the colours of a cropped stream in the wrong rows. A stream that says
nothing of cropping is decoded rightly, so frames are cropped afterwards.

Source: ITU-T H.264, 7.3.2.1.1 and ITU-T H.265, 7.3.2.2.1, 7.3.3 (sequence parameter sets);
H.264, 7.4.1.1 (emulation prevention).
"""

from dataclasses import dataclass

from megatron_keye.data.bitstream.bits import ENDS_EARLY, Bits
from megatron_keye.errors import UserError

_MACROBLOCK = 16
_CHROMA_420 = 1
_WITH_CHROMA_FORMAT = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


@dataclass(frozen=True, kw_only=True)
class SequenceParameters:
    """A sequence parameter set."""

    unit: bytes
    """As the stream has it, without start code or length."""
    uncropped: bytes
    """The same without cropping."""
    stored_height: int
    """Rows that are stored."""
    stored_width: int
    """Columns that are stored."""
    height: int
    """Rows that are left of them."""
    width: int
    """Columns that are left of them."""

    @property
    def is_cropped(self) -> bool:
        """Whether the stream says that pictures are smaller than what is stored."""
        return self.unit != self.uncropped


def read_sequence_parameters(codec: str, unit: bytes) -> SequenceParameters:
    """Read a sequence parameter set of 4:2:0 pictures that are whole frames.

    Args:
        codec: "h264" or "hevc".
        unit: The unit with its header.

    Raises:
        UserError: Why it can't be read, or that it crops at the left or at the top, worded to
            follow upon the name of a file.
    """
    header_size = 1 if codec == "h264" else 2
    # A 3 behind two zeros is no content: it keeps start codes out of units.
    reader = Bits(unit[header_size:].replace(b"\0\0\3", b"\0\0"))
    width, height = _h264_size(reader) if codec == "h264" else _hevc_size(reader)
    flag = reader.place
    left = right = top = bottom = 0
    uncropped = unit
    if reader.number(1):
        left, right, top, bottom = (2 * reader.golomb() for _ in range(4))
        rest = reader.bits[reader.place :].rstrip("0")
        if not rest:
            raise UserError(ENDS_EARLY)
        kept = reader.bits[:flag] + "0" + rest
        kept += "0" * (-len(kept) % 8)
        content = int(kept, 2).to_bytes(len(kept) // 8, "big")
        uncropped = unit[:header_size] + _guarded(content)
    if left or top:
        raise UserError("its pictures are cropped at the left or at the top")
    return SequenceParameters(
        unit=unit,
        uncropped=uncropped,
        stored_height=height,
        stored_width=width,
        height=height - bottom,
        width=width - right,
    )


def _h264_size(reader: Bits) -> tuple[int, int]:
    """Return stored (width, height), and stop in front of the flag that tells of cropping."""
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
        raise UserError("its pictures may be fields, expected whole frames only")
    reader.number(1)
    return width, height


def _hevc_size(reader: Bits) -> tuple[int, int]:
    """As `_h264_size`."""
    reader.number(4)
    num_lower_layers = reader.number(3)
    reader.number(1)
    # General profile and level, then which lower temporal layers tell theirs, and those.
    reader.number(88 + 8)
    told = [(reader.number(1), reader.number(1)) for _ in range(num_lower_layers)]
    if told:
        reader.number(2 * (8 - num_lower_layers))  # Room for eight in all.
    for has_profile, has_level in told:
        reader.number(88 * has_profile + 8 * has_level)
    reader.golomb()
    _expect_420(reader)
    return reader.golomb(), reader.golomb()


def _skip_chroma_format(reader: Bits) -> None:
    """Read past what the higher profiles say of samples and scaling."""
    _expect_420(reader)
    reader.golomb()
    reader.golomb()
    reader.number(1)
    if reader.number(1):
        for matrix in range(8):
            if reader.number(1):
                _skip_scaling_list(reader, 16 if matrix < 6 else 64)


def _expect_420(reader: Bits) -> None:
    chroma_format = reader.golomb()
    if chroma_format != _CHROMA_420:
        raise UserError(f"its chroma format is {chroma_format}, expected {_CHROMA_420} (4:2:0)")


def _skip_scaling_list(reader: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + reader.signed_golomb()) % 256
        last = following or last


def _skip_picture_order(reader: Bits) -> None:
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
