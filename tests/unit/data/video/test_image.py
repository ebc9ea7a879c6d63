# SPDX-License-Identifier: Apache-2.0
"""Images are upright and of one size when probed and when decoded, or refused by name."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base

from megatron_keye.data.video import image as image_file
from megatron_keye.data.video.image import decode_image, probe_image
from megatron_keye.errors import UserError
from tests.support.images import png_chunk, write_png

# How a picture is stored so that its orientation turns it upright.
STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, -1),
}
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100},
    "MPO": {"quality": 100},
    "PNG": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100},
}


def quarters() -> NDArray[np.uint8]:
    """Return 16 x 48 pixels whose quarters differ, so that every turn shows."""
    colors = np.array([[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 250, 250)]], np.uint8)
    return colors.repeat(8, axis=0).repeat(24, axis=1)


def assert_upright(path: Path) -> None:
    pixels = decode_image(path)
    assert probe_image(path) == pixels.shape[:2] == (16, 48)
    assert abs(pixels[4::8, 12::24].astype(int) - quarters()[4::8, 12::24]).max() < 12


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[Base.Orientation] = orientation
    return tags


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_stored_sideways_is_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](quarters())))
    path = tmp_path / "image"
    stored.save(path, kind.split()[0], exif=exif(orientation), **FORMATS[kind])
    assert_upright(path)


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_orientation_after_the_pixels_or_in_xmp_counts(
    tmp_path: Path, orientation: int
) -> None:
    stored = np.ascontiguousarray(STORED[orientation](quarters()))
    path = write_png(tmp_path / "late.png", stored.reshape(len(stored), -1), "rgb", 8)
    late = png_chunk(b"eXIf", exif(orientation).tobytes().removeprefix(b"Exif\0\0"))
    end = png_chunk(b"IEND", b"")
    path.write_bytes(path.read_bytes().removesuffix(end) + late + end)
    assert_upright(path)
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    for kind in ("JPEG", "TIFF", "WEBP"):
        tagged = tmp_path / kind
        options = {"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}
        Image.fromarray(stored).save(tagged, kind, **options)
        assert_upright(tagged)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_shown(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (32, 16), color) for color in ("red", "lime", "blue")]
    path = tmp_path / "animation"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=100)
    assert Image.open(path).n_frames == 3
    assert abs(decode_image(path).mean((0, 1)) - (255, 0, 0)).max() < 3


def test_large_images_are_read_up_to_a_bound(tmp_path: Path) -> None:
    width, height = 10_000, 9_500
    assert 2 * width * height > image_file.MAX_PIXELS > width * height
    large = write_png(tmp_path / "large.png", np.zeros((height, width // 8), np.uint8), "grey", 1)
    assert probe_image(large) == (height, width)
    content = large.read_bytes()
    header = content[16:20] + (2 * height).to_bytes(4) + content[24:29]
    (tmp_path / "larger.png").write_bytes(
        content[:12] + b"IHDR" + header + zlib.crc32(b"IHDR" + header).to_bytes(4) + content[33:]
    )
    with pytest.raises(UserError, match=r"larger\.png: has more than 178,956,970 pixels"):
        probe_image(tmp_path / "larger.png")


def test_the_bound_holds_without_the_one_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(image_file, "MAX_PIXELS", 40)
    Image.new("L", (7, 6)).save(tmp_path / "image.png")
    with pytest.raises(UserError, match=r"image\.png: has 7 x 6 pixels, expected .* at most 40"):
        decode_image(tmp_path / "image.png")


def test_a_format_that_another_program_would_decode_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "page.eps")
    with pytest.raises(UserError, match=r"page\.eps: cannot be read as an image"):
        probe_image(tmp_path / "page.eps")


def test_our_own_errors_keep_their_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("I;16", (8, 8)).save(tmp_path / "image.png")

    def broken(image: Image.Image) -> None:
        raise ValueError("a programming error")

    monkeypatch.setattr(image_file, "deep_grey_to_bytes", broken)
    with pytest.raises(ValueError, match="a programming error") as raised:
        decode_image(tmp_path / "image.png")
    assert not isinstance(raised.value, UserError)
