"""Takes the cropping out of H.264 and HEVC streams, with FFmpeg's bitstream filters.

Streams store whole blocks: 1080 rows are often 1088, of which the last eight are cropped. DALI
reuses a decoder that it made for another stream if the stored sizes agree, even if the shown ones
do not, and then reads the colours of cropped frames from the wrong rows. Streams that declare no
cropping are decoded correctly, so frames are cropped after decoding.
"""

import av
from av.bitstream import BitStreamFilterContext
from av.video.stream import VideoStream

from megatron_keye.data.bitstream.description import Description
from megatron_keye.data.bitstream.nal_units import sps_nal_units, with_sps
from megatron_keye.errors import UserError

_FILTERS = {"h264": "h264_metadata", "hevc": "hevc_metadata"}
_UNCROPPED = "crop_left=0:crop_right=0:crop_top=0:crop_bottom=0"


def remove_cropping(stream: VideoStream, target: VideoStream | None) -> None:
    """Rewrite the parameter sets in front of a stream.

    Args:
        stream: Of H.264 or HEVC.
        target: Output stream that takes the rewritten sets, which may be `stream`; None to check
            that they can be rewritten.

    Raises:
        UserError: That they can't; worded to follow the name of a file.
    """
    name = _FILTERS[stream.codec_context.codec.canonical_name]
    try:
        BitStreamFilterContext(f"{name}={_UNCROPPED}", stream, target)
    except av.FFmpegError as error:
        raise UserError(f"its cropping can't be removed ({error.strerror})") from error


def packets_without_cropping(
    packets: list[bytes], description: Description, target: VideoStream
) -> list[bytes]:
    """Return packets as they follow the rewritten sets.

    Args:
        packets: Without `unsupported_reason`, so that all bring the same SPS, if any.
        description: Of the stream that they were read from.
        target: As above.
    """
    # Not filtered, since FFmpeg would parse all slices, and refuse what decoders tolerate.
    extradata = bytes(target.codec_context.extradata or b"")
    (sps,) = sps_nal_units(description.codec, extradata, extradata)
    return [with_sps(description.codec, packet, description.extradata, sps) for packet in packets]
