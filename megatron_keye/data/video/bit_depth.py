# SPDX-License-Identifier: Apache-2.0
"""Grey images of more than 8 bits become bytes: black is 0, white 255, in between linear.

Pillow clips such numbers at 255 instead, which turns nearly all pixels white.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from megatron_keye.errors import UserError

_UNSIGNED, _WHITE_IS_ZERO = 1, 0
_WHITES = (1.0, 255.0, 65_535.0, 2.0**31 - 1, 2.0**32 - 1)


def is_deep_grey(image: Image.Image) -> bool:
    """Return whether an image is grey with more than 8 bits a pixel."""
    return image.mode.startswith(("I", "F"))


def stated_white(image: Image.Image) -> float | None:
    """Return the number that a deep grey image shows as white, None where its format says none."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (16,))[0]
        return float(2**bits - 1)
    return 65_535.0 if image.format == "PPM" and image.mode == "I" else None


def deep_grey_to_bytes(image: Image.Image) -> NDArray[np.uint8]:
    """Return the bytes of a grey image of more than 8 bits.

    White is the highest number of as many bits as the file states for a pixel: 2^16 - 1, or
    2^12 - 1 in a TIFF of 12 bits. Signed and 32-bit integers and floats state nothing of the kind:
    there white is the smallest of 1 (for floats alone), 255, 65,535, 2^31 - 1 and 2^32 - 1 that no
    pixel exceeds. Where a TIFF says that white is zero, black and white change places.

    Args:
        image: Loaded image of mode "I;16" in any byte order, "I" or "F".

    Returns:
        uint8 [height, width], rounded to the nearest.

    Raises:
        UserError: Without the file's name, for numbers that are negative, not finite or larger
            than any of the whites.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags and tags.get(SAMPLEFORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        # Pillow has no unsigned mode of 32 bits; what it calls negative is 2^31 and more.
        values = values.view(np.uint32)
    white = stated_white(image) or _least_white(values)
    levels = np.rint(values.astype(np.float32) * np.float32(255 / white)).astype(np.uint8)
    return 255 - levels if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO else levels


def _least_white(values: NDArray[Any]) -> float:
    """Return the smallest usual white that no pixel exceeds."""
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= _WHITES[-1]):
        raise UserError(
            f"holds numbers from {least:g} to {most:g}, expected grey levels from 0 to 1, 255, "
            "65,535, 2^31 - 1 or 2^32 - 1; store them as 8 or 16 bits"
        )
    usual = _WHITES if values.dtype.kind == "f" else _WHITES[1:]
    return next(white for white in usual if most <= white)
