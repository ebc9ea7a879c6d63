# SPDX-License-Identifier: Apache-2.0
"""Reads still images: their size without decoding, and their upright pixels.

Apart from video because images have no time, and orientation comes from EXIF.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile

from megatron_keye.data.reading import reading
from megatron_keye.data.video.bit_depth import deep_grey_to_bytes, is_deep_grey, stated_white
from megatron_keye.errors import UserError

MAX_PIXELS = 178_956_970
"""Most pixels of an image, half a gigabyte as RGB; Pillow refuses more too."""
_KIND = "an image"
# Formats whose pixels Pillow has from another program or not at all: it runs Ghostscript on EPS.
_WITHOUT_PIXELS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by its EXIF orientation."""
_SIDEWAYS = (5, 6, 7, 8)
# Pillow keeps the transparent colour of a PNG in the file's bits, but scales pixels to 8.
_TRANSPARENCY_SCALES = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
# Warns from 89 megapixels on; images up to twice as many are read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def probe_image(path: Path) -> tuple[int, int]:
    """Return (height, width) in pixels after EXIF orientation, without decoding where possible.

    Raises:
        UserError: For a file that is missing, is not an image, has more than MAX_PIXELS or grey
            levels of unknown range.
    """
    with _opened(path) as image:
        if is_deep_grey(image) and stated_white(image) is None:
            height, width = _upright(path, image).shape[:2]
            return height, width
        with reading(path, _KIND):
            width, height = image.size
            is_sideways = _orientation(image) in _SIDEWAYS
    return (width, height) if is_sideways else (height, width)


def decode_image(path: Path) -> NDArray[np.uint8]:
    """Return the upright pixels of an image; of an animation, its first frame.

    Colours are taken as they are stored: profiles (ICC) and gamma are not applied, as in the
    preprocessing of the Qwen family. CMYK is converted by R = (255 - C)(255 - K) / 255, in JPEG
    with Adobe's inverted inks; CIELAB to sRGB. Grey levels of more than 8 bits become bytes as
    `deep_grey_to_bytes` says; colours of 16 bits lose their lower byte.

    Args:
        path: Image file. Transparent parts are laid over white.

    Returns:
        uint8 RGB [height, width, 3], EXIF orientation obeyed.

    Raises:
        UserError: As `probe_image`, or for a file that is damaged or ends too early.
    """
    with _opened(path) as image:
        return _upright(path, image)


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """Open an image of a format that is decoded in this process, and check its size."""
    with reading(path, _KIND):
        Image.init()
        formats = [name for name in Image.ID if name not in _WITHOUT_PIXELS]
        try:
            image = Image.open(path, formats=formats)
        except Image.DecompressionBombError as error:
            raise UserError(
                f"{path}: has more than {MAX_PIXELS:,} pixels, expected at most that many; store "
                "it with another size"
            ) from error
    with image:
        if not 0 < image.width * image.height <= MAX_PIXELS:
            raise UserError(
                f"{path}: has {image.width} x {image.height} pixels, expected at least one and at "
                f"most {MAX_PIXELS:,}; store it with another size"
            )
        yield image


def _upright(path: Path, image: ImageFile) -> NDArray[np.uint8]:
    """Decode an opened image into uint8 RGB [height, width, 3]."""
    with reading(path, _KIND):
        transparent = _transparent_color(image)
        image.load()
        turn = _TURNS.get(_orientation(image))
    if is_deep_grey(image):
        try:
            levels = deep_grey_to_bytes(image)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if transparent is not None:
            levels[np.asarray(image) == transparent] = 255
        flat = Image.fromarray(levels)
    with reading(path, _KIND):
        if not is_deep_grey(image):
            flat = _over_white(image, transparent)
        turned = flat if turn is None else flat.transpose(turn)
        return np.array(turned.convert("RGB"), dtype=np.uint8)


def _over_white(image: ImageFile, transparent: int | tuple[int, ...] | None) -> Image.Image:
    """Lay an image over white where it is transparent."""
    if transparent is not None:
        image.info["transparency"] = transparent
    if not image.has_transparency_data:
        return image
    colors = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors)


def _orientation(image: ImageFile) -> int:
    """Return the EXIF orientation that the image's size and pixels do not obey yet."""
    # Of TIFF, Pillow turns the size when it opens and the pixels when it loads.
    if Base.Orientation in getattr(image, "tag_v2", {}):
        return 1
    orientation: int = image.getexif().get(Base.Orientation, 1)
    return orientation


def _transparent_color(image: ImageFile) -> int | tuple[int, ...] | None:
    """Return the one transparent colour of a PNG without palette, before it is loaded."""
    color = image.info.get("transparency")
    if image.format != "PNG" or image.mode == "P" or color is None:
        return None
    scale = _TRANSPARENCY_SCALES.get(str(image.tile[0].args), 1.0)
    if isinstance(color, tuple):
        return tuple(int(value * scale) for value in color)
    return int(color * scale)
