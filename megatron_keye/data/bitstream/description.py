"""What a stream says of itself before its first picture, as far as a decoder on the GPU needs it.

Source: ISO/IEC 14496-15, 5.3.3.1 (AVCDecoderConfigurationRecord) and 8.3.3.1
(HEVCDecoderConfigurationRecord).
"""

from dataclasses import dataclass

from av.video.stream import VideoStream

from megatron_keye.data.bitstream import nal_units
from megatron_keye.data.bitstream.sps import SequenceParameters, read_sequence_parameters
from megatron_keye.errors import UserError

_H264_SETS = 5
"""Place in the record of the byte that counts sequence parameter sets, which follow it."""
_HEVC_ARRAYS = 22
"""Place in the record of the byte that counts arrays of units, which follow it."""
_CUT_SHORT = "its parameters in front are cut short"


@dataclass(frozen=True, kw_only=True)
class Description:
    """A stream of H.264, HEVC or VP9."""

    codec: str
    """FFmpeg's name."""
    extradata: bytes
    """As its container has it."""
    parameters: SequenceParameters | None
    """None for VP9, whose frames tell their own size and crop nothing."""
    uncropped: bytes
    """Extradata of the same stream with its pictures as they are stored."""

    def unsupported_reason(self, packet: bytes) -> str:
        """Return what a packet's own parameters speak against pieces of the stream, or ""."""
        if self.parameters is None:
            return ""
        brought = nal_units.sequence_parameters(self.codec, packet, self.extradata)
        if any(unit != self.parameters.unit for unit in brought):
            return "its parameters change inside"
        return ""

    def without_cropping(self, packet: bytes) -> bytes:
        """Return a packet as a stream with `uncropped` has it; one that has no `obstacle`."""
        if self.parameters is None or not self.parameters.is_cropped:
            return packet
        replacements = {self.parameters.unit: self.parameters.uncropped}
        return nal_units.with_sequence_parameters(self.codec, packet, self.extradata, replacements)


def describe(stream: VideoStream) -> Description:
    """Read a stream's description.

    Raises:
        UserError: Why a GPU can't be given this stream: parameters that are missing, several, or
            not to be read, or another size than the container's. Worded to follow upon the name
            of a file.
    """
    codec = stream.codec_context.name
    extradata = bytes(stream.codec_context.extradata or b"")
    if codec not in nal_units.SEQUENCE_PARAMETERS:
        return Description(codec=codec, extradata=extradata, parameters=None, uncropped=extradata)
    is_record = extradata[:1] == b"\1"
    if is_record:
        places = (_h264_sets if codec == "h264" else _hevc_sets)(extradata)
        units = [extradata[place].rstrip(b"\0") for place in places]
    else:
        places = []
        units = list(dict.fromkeys(nal_units.sequence_parameters(codec, extradata, extradata)))
    if len(units) != 1:
        raise UserError(f"it has {len(units)} sequence parameter sets in front, expected one")
    parameters = read_sequence_parameters(codec, units[0])
    told, held = (parameters.width, parameters.height), (stream.width, stream.height)
    if told != held:
        raise UserError(f"its stream has {told} pixels across and down, its container {held}")
    if not parameters.is_cropped:
        uncropped = extradata
    elif is_record:
        (place,) = places
        length = len(parameters.uncropped).to_bytes(2, "big")
        uncropped = extradata[: place.start - 2] + length + parameters.uncropped
        uncropped += extradata[place.stop :]
    else:
        replacements = {parameters.unit: parameters.uncropped}
        uncropped = nal_units.with_sequence_parameters(codec, extradata, extradata, replacements)
    return Description(
        codec=codec, extradata=extradata, parameters=parameters, uncropped=uncropped
    )


def _h264_sets(record: bytes) -> list[slice]:
    """Return the places of the sequence parameter sets in a record."""
    count = record[_H264_SETS] & 31 if len(record) > _H264_SETS else 0
    return _sized_units(record, _H264_SETS + 1, count)


def _hevc_sets(record: bytes) -> list[slice]:
    """As `_h264_sets`."""
    found: list[slice] = []
    place = _HEVC_ARRAYS + 1
    for _ in range(record[_HEVC_ARRAYS] if len(record) > _HEVC_ARRAYS else 0):
        if place + 3 > len(record):
            raise UserError(_CUT_SHORT)
        kind, count = record[place] & 63, int.from_bytes(record[place + 1 : place + 3], "big")
        units = _sized_units(record, place + 3, count)
        place = units[-1].stop if units else place + 3
        if kind == nal_units.SEQUENCE_PARAMETERS["hevc"]:
            found += units
    return found


def _sized_units(record: bytes, place: int, count: int) -> list[slice]:
    """Return the places of units that each follow their length in two bytes."""
    units: list[slice] = []
    for _ in range(count):
        stop = place + 2 + int.from_bytes(record[place : place + 2], "big")
        if stop > len(record):
            raise UserError(_CUT_SHORT)
        units.append(slice(place + 2, stop))
        place = stop
    return units
