"""What a stream declares in front of its first frame, as far as a decoder on the GPU needs it.

Source: ISO/IEC 14496-15, 5.3.3.1 (AVCDecoderConfigurationRecord) and 8.3.3.1
(HEVCDecoderConfigurationRecord).
"""

import io
from dataclasses import dataclass

from av.video.stream import VideoStream

from megatron_keye.data.bitstream.nal_units import SPS_TYPES, sps_nal_units
from megatron_keye.data.bitstream.sps import Sps, read_sps
from megatron_keye.errors import UserError

_H264_NUM_SPS = 5
"""Place in the record of the byte that counts SPS, which follow it."""
_HEVC_NUM_ARRAYS = 22
"""Place in the record of the byte that counts arrays of NAL units, which follow it."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """A stream of H.264, HEVC or VP9."""

    codec: str
    """FFmpeg's name."""
    extradata: bytes
    """As its container has it."""
    sps: Sps | None
    """None for VP9, whose frames declare their own size and crop nothing."""

    def unsupported_reason(self, packet: bytes) -> str:
        """Return why a packet's own SPS keeps it from the GPU, "" if none does."""
        if self.sps is None:
            return ""
        found = sps_nal_units(self.codec, packet, self.extradata)
        is_other = any(nal_unit != self.sps.nal_unit for nal_unit in found)
        return "its parameters change inside" if is_other else ""


def describe(stream: VideoStream) -> Description:
    """Read a stream's description.

    Raises:
        UserError: Why a GPU can't be given this stream: an SPS that is missing, not the only one,
            not to be read, or of another size than the container's. Worded to follow the name of
            a file.
    """
    codec = stream.codec_context.name
    extradata = bytes(stream.codec_context.extradata or b"")
    if codec not in SPS_TYPES:
        return Description(codec=codec, extradata=extradata, sps=None)
    if extradata[:1] == b"\1":
        nal_units = (_h264_sps if codec == "h264" else _hevc_sps)(io.BytesIO(extradata))
    else:
        nal_units = list(dict.fromkeys(sps_nal_units(codec, extradata, extradata)))
    if len(nal_units) != 1:
        raise UserError(f"it has {len(nal_units)} sequence parameter sets in front, expected one")
    sps = read_sps(codec, nal_units[0])
    declared, expected = (sps.width, sps.height), (stream.width, stream.height)
    if declared != expected:
        raise UserError(
            f"its stream has {declared} pixels across and down, its container {expected}"
        )
    return Description(codec=codec, extradata=extradata, sps=sps)


def _h264_sps(record: io.BytesIO) -> list[bytes]:
    """Return the SPS in a record."""
    record.seek(_H264_NUM_SPS)
    num_sps = int.from_bytes(record.read(1)) & 31
    return [_read_nal_unit(record) for _ in range(num_sps)]


def _hevc_sps(record: io.BytesIO) -> list[bytes]:
    """As `_h264_sps`."""
    found: list[bytes] = []
    record.seek(_HEVC_NUM_ARRAYS)
    for _ in range(int.from_bytes(record.read(1))):
        nal_type = _read(record, 1)[0] & 63
        num_nal_units = int.from_bytes(_read(record, 2))
        nal_units = [_read_nal_unit(record) for _ in range(num_nal_units)]
        if nal_type == SPS_TYPES["hevc"]:
            found += nal_units
    return found


def _read_nal_unit(record: io.BytesIO) -> bytes:
    """Read a NAL unit, which follows its length in two bytes."""
    return _read(record, int.from_bytes(_read(record, 2))).rstrip(b"\0")


def _read(record: io.BytesIO, size: int) -> bytes:
    content = record.read(size)
    if len(content) < size:
        raise UserError("its parameters in front are cut short")
    return content
