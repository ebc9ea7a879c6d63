# SPDX-License-Identifier: Apache-2.0
"""Sizes of H.264 and HEVC frames, stored and shown, read from sequence parameter sets (SPS).

Source: ITU-T H.264, 7.3.2.1.1 and ITU-T H.265, 7.3.2.2.1, 7.3.3 (sequence parameter sets);
H.264, 7.4.1.1 (emulation prevention).
"""

from dataclasses import dataclass

from megatron_keye.data.bitstream.bits import Bits
from megatron_keye.errors import UserError

_MACROBLOCK = 16
_CHROMA_420 = 1
_WITH_CHROMA_FORMAT = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


@dataclass(frozen=True, kw_only=True)
class Sps:
    """A sequence parameter set."""

    nal_unit: bytes
    """As the stream has it, without start code or length."""
    stored_height: int
    """Rows before cropping."""
    stored_width: int
    """Columns before cropping."""
    height: int
    """Rows after cropping."""
    width: int
    """Columns after cropping."""

    @property
    def is_cropped(self) -> bool:
        """Whether frames are shown smaller than they are stored."""
        return (self.height, self.width) != (self.stored_height, self.stored_width)


def read_sps(codec: str, nal_unit: bytes) -> Sps:
    """Read the SPS of a 4:2:0 stream of whole frames.

    Args:
        codec: "h264" or "hevc".
        nal_unit: The NAL unit with its header.

    Raises:
        UserError: Why it can't be read, or that it crops at the left or at the top; worded to
            follow the name of a file.
    """
    header_size = 1 if codec == "h264" else 2
    # Emulation prevention: a 3 behind two zeros keeps start codes out of NAL units.
    reader = Bits(nal_unit[header_size:].replace(b"\0\0\3", b"\0\0"))
    width, height = _h264_size(reader) if codec == "h264" else _hevc_size(reader)
    left = right = top = bottom = 0
    if reader.read_u(1):
        left, right, top, bottom = (2 * reader.read_ue() for _ in range(4))
    if left or top:
        raise UserError("its pictures are cropped at the left or at the top")
    return Sps(
        nal_unit=nal_unit,
        stored_height=height,
        stored_width=width,
        height=height - bottom,
        width=width - right,
    )


def _h264_size(reader: Bits) -> tuple[int, int]:
    """Return stored (width, height), and stop in front of the cropping flag."""
    profile = reader.read_u(8)
    reader.read_u(16)
    reader.read_ue()
    if profile in _WITH_CHROMA_FORMAT:
        _skip_chroma_format(reader)
    reader.read_ue()
    _skip_picture_order(reader)
    reader.read_ue()
    reader.read_u(1)
    width, height = (_MACROBLOCK * (reader.read_ue() + 1) for _ in range(2))
    if not reader.read_u(1):
        raise UserError("its pictures may be fields, expected whole frames only")
    reader.read_u(1)
    return width, height


def _hevc_size(reader: Bits) -> tuple[int, int]:
    """As `_h264_size`."""
    reader.read_u(4)
    num_lower_layers = reader.read_u(3)
    reader.read_u(1)
    # General profile and level, then which lower temporal layers declare theirs, and those.
    reader.read_u(88 + 8)
    declared = [(reader.read_u(1), reader.read_u(1)) for _ in range(num_lower_layers)]
    if declared:
        reader.read_u(2 * (8 - num_lower_layers))  # Room for eight in all.
    for has_profile, has_level in declared:
        reader.read_u(88 * has_profile + 8 * has_level)
    reader.read_ue()
    _expect_420(reader)
    return reader.read_ue(), reader.read_ue()


def _skip_chroma_format(reader: Bits) -> None:
    """Skip what the higher profiles declare of samples and scaling."""
    _expect_420(reader)
    reader.read_ue()
    reader.read_ue()
    reader.read_u(1)
    if reader.read_u(1):
        for matrix in range(8):
            if reader.read_u(1):
                _skip_scaling_list(reader, 16 if matrix < 6 else 64)


def _expect_420(reader: Bits) -> None:
    chroma_format = reader.read_ue()
    if chroma_format != _CHROMA_420:
        raise UserError(f"its chroma format is {chroma_format}, expected {_CHROMA_420} (4:2:0)")


def _skip_scaling_list(reader: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + reader.read_se()) % 256
        last = following or last


def _skip_picture_order(reader: Bits) -> None:
    kind = reader.read_ue()
    if kind == 0:
        reader.read_ue()
    elif kind == 1:
        reader.read_u(1)
        reader.read_ue()
        reader.read_ue()
        for _ in range(reader.read_ue()):
            reader.read_ue()
