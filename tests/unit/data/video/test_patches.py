# SPDX-License-Identifier: Apache-2.0
"""Patches: order, values and resizing, against the plainest ways to get them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from megatron_keye.data.video.image import decode_image, probe_image
from megatron_keye.data.video.patches import _resize_floats, make_patches


def test_patches_come_in_raster_order_within_each_frame() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    patches = make_patches(torch.from_numpy(frames), (2, 3), 4)
    assert patches.shape == (18, 3, 4, 4) and patches.dtype == torch.float32
    for place in range(18):
        frame, row, column = place // 6, place % 6 // 3, place % 3
        cut = frames[frame, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        expected = (cut.transpose(2, 0, 1) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(patches[place].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("patch_grid", [(2, 3), (6, 10), (12, 4)])
def test_resizing_follows_pillow(patch_grid: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (97, 61, 3), dtype=np.uint8)
    size = (patch_grid[1] * 14, patch_grid[0] * 14)
    # Axis by axis, since the order of the two passes shows on noise.
    across = Image.fromarray(frame).resize((size[0], 97), Image.Resampling.BICUBIC)
    expected = np.asarray(across.resize(size, Image.Resampling.BICUBIC))
    patches = make_patches(torch.from_numpy(frame[None]), patch_grid, 14)
    pixels = (patches.reshape(*patch_grid, 3, 14, 14).permute(0, 3, 1, 4, 2) + 1) * 127.5
    difference = np.abs(pixels.reshape(size[1], size[0], 3).numpy() - expected)
    assert difference.max() <= 1.001


@pytest.mark.parametrize("patch_grid", [(2, 3), (6, 10), (12, 4)])
def test_resizing_in_floats_follows_the_bytes(patch_grid: tuple[int, int]) -> None:
    """What a GPU does, done on the CPU: the bytes differ by one at most, and rarely."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 97, 61), dtype=torch.uint8, generator=generator)
    size = (patch_grid[0] * 14, patch_grid[1] * 14)
    expected = interpolate(pixels, size=size, mode="bicubic", antialias=True)
    across = _resize_floats(pixels, (97, size[1]))
    difference = (_resize_floats(across, size).int() - expected).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.01


def test_image_orientation_is_obeyed(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:10, :15] = 255
    path = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    assert probe_image(path) == (30, 20)
    np.testing.assert_array_equal(decode_image(path), np.rot90(pixels, -1))


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "image.png")
    assert (decode_image(tmp_path / "image.png") == 255).all()


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut"])
def test_bad_images_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.jpg"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello")
    elif kind == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"bad\.jpg: "):
        decode_image(path)
