# SPDX-License-Identifier: Apache-2.0
"""Damaged images of every format and mode that Pillow writes: a named error, or what is left.

Exact means that Pillow, asked plainly, gives the same pixels; a format without checksums may then
show anything. No damage may end in another exception, hang or take memory without bound.
"""

import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_keye.data.video.bit_depth import is_deep_grey
from megatron_keye.data.video.image import decode_image, probe_image
from tests.support.child import Child
from tests.support.damage import Case, check_outcomes, damaged_cases, outcome_of

TIMEOUT_SECONDS, MOST_MEBIBYTES = 20.0, 3072.0
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
FORMATS: dict[str, list[dict[str, Any]]] = {
    **{name: [{}] for name in ("BLP", "BMP", "DDS", "DIB", "ICNS", "ICO", "IM", "MSP", "PCX")},
    **{name: [{}] for name in ("PPM", "QOI", "SGI", "SPIDER", "TGA", "XBM")},
    "AVIF": [{}, {"animated": True}],
    "GIF": [{}, {"animated": True}],
    "JPEG": [{}, {"progressive": True}],
    "JPEG2000": [{}],
    "MPO": [{"animated": True}],
    "PNG": [{}, {"animated": True}],
    "TIFF": [
        {},
        {"animated": True},
        *({"compression": f"tiff_{kind}"} for kind in ("lzw", "jpeg", "adobe_deflate")),
        *({"compression": kind} for kind in ("packbits", "group4")),
    ],
    "WEBP": [{}, {"animated": True}],
}


def picture(mode: str) -> Image.Image:
    """Return 40 x 28 pixels with all levels and with transparency."""
    levels = np.linspace(0, 255, 40 * 28).reshape(28, 40).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(levels.astype(np.uint16) * 257)
    bands = [levels, levels[::-1], levels[:, ::-1], levels[::-1, ::-1]]
    image = Image.merge("RGBA", [Image.fromarray(np.ascontiguousarray(band)) for band in bands])
    return (image if mode in ("LA", "PA", "RGBA") else image.convert("RGB")).convert(mode)


def write_kinds(folder: Path, name: str) -> dict[str, Path]:
    """Write one image for each way in which a format stores pixels, as Pillow reads them."""
    kinds: dict[str, Path] = {}
    for options in FORMATS[name]:
        for mode in MODES:
            path = folder / "written"
            try:
                save(picture(mode), path, name, **options)
                with Image.open(path) as image:
                    kind = f"{name} {options or ''} {image.mode}"
            except (OSError, ValueError, KeyError):
                continue  # The format has no such mode.
            if kind not in kinds:
                kinds[kind] = path.rename(folder / f"image{len(kinds)}")
    return kinds


def save(image: Image.Image, path: Path, name: str, **options: Any) -> None:
    if options.pop("animated", False):
        options |= {"save_all": True, "append_images": [ImageOps.mirror(image)] * 2}
    image.save(path, name, **options)


def read(case: Case) -> str:
    """Probe and decode a file; "error" or "exact", or what is wrong with the outcome."""
    silence()
    return outcome_of(case, compare, most_mebibytes=MOST_MEBIBYTES)


@cache
def silence() -> None:
    """Hide what libraries print about damage, some of it from C."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def compare(case: Case) -> str:
    path = Path(case.path)
    size = probe_image(path)
    pixels = decode_image(path)
    if pixels.shape[:2] != size:
        return f"was probed as {size} and decoded as {pixels.shape}"
    with Image.open(path) as image:
        if is_deep_grey(image) or image.info.get("transparency") is not None:
            return "exact"
        plain = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", plain.size, "white")
    expected = np.asarray(Image.alpha_composite(white, plain).convert("RGB"))
    return "exact" if np.array_equal(pixels, expected) else "other pixels than Pillow's"


@pytest.fixture(scope="module")
def reader() -> Iterator[Child]:
    with Child(read, TIMEOUT_SECONDS) as child:
        yield child


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_images_are_refused_or_read_exactly(
    tmp_path: Path, reader: Child, num_damaged: int, name: str
) -> None:
    kinds = write_kinds(tmp_path, name)
    assert kinds, "Pillow writes none"
    outcomes: dict[str, str] = {}
    for seed, (kind, path) in enumerate(kinds.items()):
        assert reader(Case(str(path), path.read_bytes(), False)) == "exact", f"{kind}, undamaged"
        for label, case in damaged_cases(path, num_damaged, seed):
            outcomes[f"{kind} {label}"] = reader(case)
    print(f"{name}: {len(kinds)} kinds, {check_outcomes(name, outcomes)}")
