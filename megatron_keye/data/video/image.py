"""Reads still images: their size without decoding, and their upright pixels.

Apart from video because images have no time, and orientation comes from EXIF.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from megatron_keye.errors import UserError

_SIDEWAYS = (5, 6, 7, 8)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image and turn what PIL raises into one sentence with the file's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: is not there, expected an image; correct the name") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: {error}; store it with fewer pixels") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as an image ({error}), expected a whole JPEG, PNG, WebP or "
            "another format that PIL knows; replace the file or drop the sample"
        ) from error


def probe_image(path: Path) -> tuple[int, int]:
    """Return (height, width) in pixels after EXIF orientation, without decoding.

    Raises:
        UserError: For a file that is missing or is not an image.
    """
    with _opened(path) as image:
        width, height = image.size
        sideways = image.getexif().get(Base.Orientation) in _SIDEWAYS
    return (width, height) if sideways else (height, width)


def decode_image(path: Path) -> NDArray[np.uint8]:
    """Return the upright pixels of an image.

    Args:
        path: Image file. Transparent parts are laid over white.

    Returns:
        uint8 RGB [height, width, 3], EXIF orientation obeyed.

    Raises:
        UserError: For a file that is missing, is not an image or ends too early.
    """
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return np.array(upright.convert("RGB"), dtype=np.uint8)
