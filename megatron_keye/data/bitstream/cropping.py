# SPDX-License-Identifier: Apache-2.0
"""Takes the cropping out of H.264 and HEVC parameter sets, with FFmpeg's bitstream filters.

Streams store whole blocks: 1080 rows are often 1088, of which the last eight are cropped. DALI
reuses a decoder that it made for another stream if the stored sizes agree, even if the shown ones
do not, and then reads the colours of cropped frames from the wrong rows. Streams that declare no
cropping are decoded correctly, so frames are cropped after decoding.
"""

import av
from av.bitstream import BitStreamFilterContext

from megatron_keye.errors import UserError

_FILTERS = {"h264": "h264_metadata", "hevc": "hevc_metadata"}
_UNCROPPED = "crop_left=0:crop_right=0:crop_top=0:crop_bottom=0"


def without_cropping(codec: str, parameter_sets: bytes) -> bytes:
    """Return parameter sets that declare no cropping.

    Args:
        codec: "h264" or "hevc".
        parameter_sets: All of a stream's, with start codes.

    Raises:
        UserError: That they can't be rewritten; worded to follow the name of a file.
    """
    try:
        uncropping = BitStreamFilterContext(f"{_FILTERS[codec]}={_UNCROPPED}", codec)
        (rewritten,) = uncropping.filter(av.Packet(parameter_sets))
    except av.FFmpegError as error:
        raise UserError(f"its cropping can't be removed ({error.strerror})") from error
    return bytes(rewritten)
