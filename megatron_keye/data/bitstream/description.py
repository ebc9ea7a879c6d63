# SPDX-License-Identifier: Apache-2.0
"""What a stream declares in front of its first frame, as far as a decoder on the GPU needs it.

Source: ISO/IEC 14496-15, 5.3.3.1 (AVCDecoderConfigurationRecord) and 8.3.3.1
(HEVCDecoderConfigurationRecord).
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass

from av.video.stream import VideoStream

from megatron_keye.data.bitstream.cropping import without_cropping
from megatron_keye.data.bitstream.nal_units import (
    SPS_TYPES,
    length_bytes,
    nal_type,
    nal_units_of,
    split_nal_units,
)
from megatron_keye.data.bitstream.sps import Sps, read_sps
from megatron_keye.errors import UserError

_H264_NUM_SPS = 5
"""Place in the record of the number of SPS, which follow it."""
_HEVC_NUM_ARRAYS = 22
"""Place in the record of the number of arrays of NAL units, which follow it."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """A stream of H.264, HEVC or VP9."""

    codec: str
    """FFmpeg's name."""
    extradata: bytes
    """As its container has it."""
    sps: Sps | None
    """None for VP9, whose frames declare their own size and crop nothing."""
    uncropped: bytes
    """Extradata of the same stream without cropping."""

    def unsupported_reason(self, packet: bytes) -> str:
        """Return why a packet's own SPS keeps it from the GPU, "" if none does."""
        if self.sps is None:
            return ""
        found = nal_units_of((SPS_TYPES[self.codec],), self.codec, packet, self.extradata)
        is_other = any(nal_unit != self.sps.nal_unit for nal_unit in found)
        return "its parameters change inside" if is_other else ""

    def without_cropping(self, packet: bytes) -> bytes:
        """Return a packet, one without unsupported reason, as it follows `uncropped`."""
        # Most packets stay as they are; they repeat the very SPS that is in front, or none.
        if self.sps is None or not self.sps.is_cropped or self.sps.nal_unit not in packet:
            return packet
        (sps,) = _sps(self.codec, nal_units_in_front(self.codec, self.uncropped))
        # Not filtered, since FFmpeg would parse all slices, and refuse what decoders tolerate.
        nal_units = [
            sps if nal_unit == self.sps.nal_unit else nal_unit
            for nal_unit in split_nal_units(self.codec, packet, self.extradata)
        ]
        return _join(nal_units, length_bytes(self.codec, self.extradata))


def describe(stream: VideoStream) -> Description:
    """Read a stream's description.

    Raises:
        UserError: Why a GPU can't be given this stream: an SPS that is missing, not the only one,
            not to be read or rewritten, or of another size than the container's. Worded to follow
            the name of a file.
    """
    codec = stream.codec_context.name
    extradata = bytes(stream.codec_context.extradata or b"")
    if codec not in SPS_TYPES:
        return Description(codec=codec, extradata=extradata, sps=None, uncropped=extradata)
    nal_units = nal_units_in_front(codec, extradata)
    found = _sps(codec, nal_units)
    if len(found) != 1:
        raise UserError(f"it has {len(found)} sequence parameter sets in front, expected one")
    sps = read_sps(codec, found[0])
    declared, expected = (sps.width, sps.height), (stream.width, stream.height)
    if declared != expected:
        raise UserError(
            f"its stream has {declared} pixels across and down, its container {expected}"
        )
    uncropped = _uncropped(codec, extradata, sps) if sps.is_cropped else extradata
    return Description(codec=codec, extradata=extradata, sps=sps, uncropped=uncropped)


def nal_units_in_front(codec: str, extradata: bytes) -> list[bytes]:
    """Return the NAL units that stand in front of a stream of H.264 or HEVC, each once.

    Raises:
        UserError: That they are cut short; worded to follow the name of a file.
    """
    if extradata[:1] != b"\1":
        return list(dict.fromkeys(split_nal_units(codec, extradata, extradata)))
    split = _h264_nal_units if codec == "h264" else _hevc_nal_units
    return list(filter(None, split(io.BytesIO(extradata))))


def _sps(codec: str, nal_units: list[bytes]) -> list[bytes]:
    return [nal_unit for nal_unit in nal_units if nal_type(codec, nal_unit) == SPS_TYPES[codec]]


def _uncropped(codec: str, extradata: bytes, sps: Sps) -> bytes:
    """Return extradata, in its own form, with an SPS that declares no cropping."""
    rewritten = without_cropping(codec, _join(nal_units_in_front(codec, extradata)))
    if not length_bytes(codec, extradata):
        return rewritten
    # In a record each NAL unit follows its length.
    (new,) = _sps(codec, split_nal_units(codec, rewritten, rewritten))
    changed = extradata.replace(_join([sps.nal_unit], 2), _join([new], 2))
    if changed == extradata:
        raise UserError("its cropping can't be removed (parameters that are padded)")
    return changed


def _join(nal_units: Iterable[bytes], width: int = 0) -> bytes:
    """Join NAL units, each behind its length in `width` bytes, or behind a start code."""
    start_code = b"\0\0\0\1"
    return b"".join(
        (len(nal_unit).to_bytes(width) if width else start_code) + nal_unit
        for nal_unit in nal_units
    )


def _h264_nal_units(record: io.BytesIO) -> list[bytes]:
    """Return the parameter sets in a record, SPS first."""
    record.seek(_H264_NUM_SPS)
    sps = [_read_nal_unit(record) for _ in range(int.from_bytes(record.read(1)) & 31)]
    return sps + [_read_nal_unit(record) for _ in range(int.from_bytes(record.read(1)))]


def _hevc_nal_units(record: io.BytesIO) -> list[bytes]:
    """Return the NAL units in a record."""
    nal_units: list[bytes] = []
    record.seek(_HEVC_NUM_ARRAYS)
    for _ in range(int.from_bytes(record.read(1))):
        _read(record, 1)
        num_nal_units = int.from_bytes(_read(record, 2))
        nal_units += [_read_nal_unit(record) for _ in range(num_nal_units)]
    return nal_units


def _read_nal_unit(record: io.BytesIO) -> bytes:
    """Read a NAL unit, which follows its length in two bytes."""
    return _read(record, int.from_bytes(_read(record, 2))).rstrip(b"\0")


def _read(record: io.BytesIO, size: int) -> bytes:
    content = record.read(size)
    if len(content) < size:
        raise UserError("its parameters in front are cut short")
    return content
