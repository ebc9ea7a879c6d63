# SPDX-License-Identifier: Apache-2.0
"""Images of every depth and colour model have the pixels that a hand computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from megatron_keye.data.video.image import decode_image, probe_image
from megatron_keye.errors import UserError
from tests.support.images import (
    BITS_PER_SAMPLE,
    EXTRA_SAMPLES,
    PHOTOMETRIC,
    SAMPLES_PER_PIXEL,
    WIDTH,
    write_png,
    write_tiff,
)

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
DEEP = RAMP.astype(np.uint16) * 257
WHITE_IS_ZERO = {PHOTOMETRIC: 0}


def saved(path: Path, values: NDArray[Any], kind: str, **options: Any) -> Path:
    Image.fromarray(values).save(path, kind, **options)
    return path


def pgm(path: Path, header: str, numbers: bytes) -> Path:
    path.write_bytes(header.encode() + numbers)
    return path


def plain(values: NDArray[Any]) -> bytes:
    return " ".join(map(str, values.ravel().tolist())).encode()


RAMPS: dict[str, Callable[[Path], Path]] = {
    "png": lambda p: saved(p, DEEP, "PNG"),
    "pgm": lambda p: saved(p, DEEP, "PPM"),
    "pgm, dark": lambda p: pgm(
        p, "P5 256 4 65280 ", np.uint16(RAMP * 256.0).astype(">u2").tobytes()
    ),
    "pgm, plain": lambda p: pgm(p, "P2 256 4 65535 ", plain(DEEP)),
    "jpeg 2000": lambda p: saved(p, DEEP, "JPEG2000"),
    "tiff": lambda p: write_tiff(p, DEEP),
    "tiff, big endian": lambda p: write_tiff(p, DEEP, order=">"),
    "tiff, lzw": lambda p: saved(p, DEEP, "TIFF", compression="tiff_lzw"),
    "tiff, white is zero": lambda p: write_tiff(p, 65_535 - DEEP, WHITE_IS_ZERO),
    "tiff, signed 16": lambda p: write_tiff(p, RAMP.astype(np.int16)),
    "tiff, signed 32": lambda p: write_tiff(p, DEEP.astype(np.int32)),
    "tiff, unsigned 32": lambda p: write_tiff(p, DEEP.astype(np.uint32) * 65_537),
    "tiff, floats to 1": lambda p: write_tiff(p, np.float32(RAMP / 255)),
    "tiff, floats to 255": lambda p: write_tiff(p, np.float32(RAMP)),
    "tiff, floats to 65,535": lambda p: write_tiff(p, np.float32(DEEP), order=">"),
    "tiff, floats, white is zero": lambda p: write_tiff(
        p, np.float32(1 - RAMP / 255), WHITE_IS_ZERO
    ),
    "pfm": lambda p: saved(p, np.float32(RAMP / 255), "PPM"),
    "im": lambda p: saved(p, DEEP.astype(np.int32), "IM"),
}


@pytest.mark.parametrize("kind", RAMPS)
def test_deep_grey_is_a_ramp_from_black_to_white(tmp_path: Path, kind: str) -> None:
    path = RAMPS[kind](tmp_path / "image")
    pixels = decode_image(path)
    assert probe_image(path) == pixels.shape[:2]
    np.testing.assert_array_equal(pixels, np.broadcast_to(RAMP[..., None], pixels.shape))


def test_a_dark_image_of_16_bits_stays_dark(tmp_path: Path) -> None:
    dark = np.full((4, 4), 200, dtype=np.uint16)
    for kind in ("PNG", "PPM", "TIFF"):
        assert (decode_image(saved(tmp_path / kind, dark, kind)) == 1).all(), kind


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, np.nan], [0.0, np.inf], [0.0, 1e12]])
def test_numbers_without_a_known_white_are_refused_when_probed(
    tmp_path: Path, values: list[float]
) -> None:
    path = write_tiff(tmp_path / "image", np.array([values], dtype=np.float32))
    for read in (probe_image, decode_image):
        with pytest.raises(UserError, match=f"^{path}: holds numbers from.*expected grey levels"):
            read(path)


def bits(*values: int) -> NDArray[np.uint8]:
    return np.array([values], dtype=np.uint8)


def words(*values: int) -> NDArray[np.uint8]:
    return np.array([values], dtype=">u2").view(np.uint8)


def ink(path: Path, kind: str, values: tuple[int, ...], **options: Any) -> Path:
    mode = "LAB" if len(values) == 3 else "CMYK"
    Image.new(mode, (16, 16), values).save(path, kind, **options)
    return path


def adobe_jpeg(path: Path, values: tuple[int, ...], transform: int) -> Path:
    """Write a JPEG that stores these four numbers, said to be CMYK (0) or YCCK (2)."""
    ink(path, "JPEG", tuple(255 - value for value in values), quality=100)
    content = path.read_bytes()
    place = content.index(b"Adobe") + 11
    path.write_bytes(content[:place] + bytes([transform]) + content[place + 1 :])
    return path


def two_colors(path: Path) -> Path:
    image = Image.fromarray(bits(0, 1), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(path, "GIF", transparency=1)
    return path


GREY_AND_ALPHA = {WIDTH: 1, BITS_PER_SAMPLE: 8, PHOTOMETRIC: 2, SAMPLES_PER_PIXEL: 4}
# How to write an image, and the colours of its first row: levels of grey, or red, green and blue.
COLORS: dict[str, tuple[Callable[[Path], Path], ArrayLike]] = {
    "png, 1 bit": (lambda p: write_png(p, bits(0b10100000), "grey", 1), [[255, 0, 255, 0]]),
    "png, 2 bits": (lambda p: write_png(p, bits(0b00011011), "grey", 2), [[0, 85, 170, 255]]),
    "png, 4 bits": (lambda p: write_png(p, bits(0x1F), "grey", 4), [[17, 255]]),
    "png, rgb of 16 bits": (
        lambda p: write_png(p, words(0x0180, 0x8000, 0xFFFF), "rgb", 16),
        [[[1, 128, 255]]],
    ),
    "png, grey and alpha of 16 bits": (
        # 64 x 128 / 255 + 255 x 127 / 255.
        lambda p: write_png(p, words(0x4000, 0xFFFF, 0x4000, 0, 0x4000, 0x8000), "grey+a", 16),
        [[64, 255, 159]],
    ),
    "png, rgb and alpha of 16 bits": (
        lambda p: write_png(p, words(0x4000, 0, 0xFF00, 0x8000), "rgb+a", 16),
        [[[159, 127, 255]]],
    ),
    "png, a grey of 2 bits is transparent": (
        lambda p: write_png(p, bits(0b00011011), "grey", 2, (b"tRNS", b"\0\1")),
        [[0, 255, 170, 255]],
    ),
    "png, a grey of 16 bits is transparent": (
        lambda p: write_png(p, words(0x1234, 0x1335), "grey", 16, (b"tRNS", b"\x12\x34")),
        [[255, 19]],
    ),
    "png, a colour of 16 bits is transparent": (
        lambda p: write_png(
            p, words(1, 2, 3, 0x1300, 2, 3), "rgb", 16, (b"tRNS", bits(0, 1, 0, 2, 0, 3).tobytes())
        ),
        [[[255, 255, 255], [19, 0, 0]]],
    ),
    "png, a palette's entry is transparent": (
        lambda p: write_png(
            *(p, bits(0, 1, 2), "palette", 8),
            *((b"PLTE", bytes(range(9))), (b"tRNS", b"\xff\x00")),
        ),
        [[[0, 1, 2], [255, 255, 255], [6, 7, 8]]],
    ),
    "gif, a palette's entry is transparent": (two_colors, [[[10, 20, 30], [255, 255, 255]]]),
    "tiff, 12 bits": (
        lambda p: write_tiff(
            p, bits(0x00, 0x08, 0x00, 0xFF, 0xF8, 0x00), {WIDTH: 4, BITS_PER_SAMPLE: 12}
        ),
        [[0, 128, 255, 128]],
    ),
    "tiff, 1 bit, white is zero": (
        lambda p: write_tiff(p, bits(0b10100000), WHITE_IS_ZERO | {WIDTH: 4, BITS_PER_SAMPLE: 1}),
        [[0, 255, 0, 255]],
    ),
    "tiff, alpha multiplied into colours": (
        # 64 + 127 and so on.
        lambda p: write_tiff(p, bits(64, 0, 32, 128), GREY_AND_ALPHA | {EXTRA_SAMPLES: 1}),
        [[[191, 127, 159]]],
    ),
    "tiff, cmyk": (
        # (255 - ink) x (255 - 51) / 255.
        lambda p: ink(p, "TIFF", (0, 51, 255, 51)),
        [[[204, 163, 0]]],
    ),
    "jpeg, cmyk": (lambda p: adobe_jpeg(p, (255, 204, 0, 204), 0), [[[204, 163, 0]]]),
    "jpeg, ycck": (
        # Red is Y + 1.402 (Cr - 128) = 184, and its ink the same; (255 - 184) x 204 / 255 = 57.
        # Green is Y - 0.714 (Cr - 128) = 116 - 29; blue Y.
        lambda p: adobe_jpeg(p, (128, 128, 168, 204), 2),
        [[[57, 125, 102]]],
    ),
    "tiff, lab": (
        # L* = 136 / 2.55 is the luminance 0.2137, which sRGB stores as 127.
        lambda p: ink(p, "TIFF", (136, 128, 128)),
        [[127]],
    ),
}


@pytest.mark.parametrize("kind", COLORS)
def test_colors_are_those_computed_by_hand(tmp_path: Path, kind: str) -> None:
    write, expected = COLORS[kind]
    path, levels = write(tmp_path / "image"), np.asarray(expected)
    levels = levels if levels.ndim == 3 else levels[..., None].repeat(3, axis=2)
    pixels = decode_image(path)
    assert probe_image(path) == pixels.shape[:2]
    shown = pixels[: levels.shape[0], : levels.shape[1]].astype(int)
    assert abs(shown - levels).max() <= 1, (shown, levels)
