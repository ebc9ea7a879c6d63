"""Patches: order, values and resizing, against the plainest ways to get them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_keye.data import Picture, load_patches
from megatron_keye.data.image import decode_image, probe_image
from megatron_keye.data.patches import make_patches
from tests.support.clips import make_clip, read_number, tiny_vision


def test_patches_come_in_raster_order_within_each_frame() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    patches = make_patches(frames, (2, 3), 4)
    assert patches.shape == (18, 3, 4, 4) and patches.dtype == torch.float32
    for place in range(18):
        frame, row, column = place // 6, place % 6 // 3, place % 3
        cut = frames[frame, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        expected = (cut.transpose(2, 0, 1) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(patches[place].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(2, 3), (6, 10), (12, 4)])
def test_resizing_follows_pillow(grid: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (97, 61, 3), dtype=np.uint8)
    size = (grid[1] * 14, grid[0] * 14)
    # Axis by axis, since the order of the two passes shows on noise.
    across = Image.fromarray(frame).resize((size[0], 97), Image.Resampling.BICUBIC)
    expected = np.asarray(across.resize(size, Image.Resampling.BICUBIC))
    patches = make_patches(frame[None], grid, 14)
    pixels = (patches.reshape(*grid, 3, 14, 14).permute(0, 3, 1, 4, 2) + 1) * 127.5
    difference = np.abs(pixels.reshape(size[1], size[0], 3).numpy() - expected)
    assert difference.max() <= 1.001


def test_pictures_keep_their_order_and_repeats(tmp_path: Path) -> None:
    vision = tiny_vision(patch_size=8)
    clips = [make_clip(tmp_path / f"{name}.mp4", 30) for name in "ab"]
    image = tmp_path / "image.png"
    Image.new("RGB", (20, 20), (255, 0, 0)).save(image)
    wanted = [(clips[0], 20), (clips[1], 3), (image, 0), (clips[0], 5), (clips[0], 20)]
    pictures = [
        Picture(media=str(path), frame=frame, grid=(6, 16), is_video=path != image)
        for path, frame in wanted
    ]
    patches = load_patches(pictures, vision).reshape(5, 6, 16, 3, 8, 8)
    frames = (patches.permute(0, 1, 4, 2, 5, 3).reshape(5, 48, 128, 3) + 1) * 127.5
    numbers = [read_number(frames[place].numpy().astype(np.uint8)) for place in (0, 1, 3, 4)]
    assert numbers == [20, 3, 5, 20]
    assert torch.equal(frames[2].mean((0, 1)).round(), torch.tensor([255.0, 0.0, 0.0]))


def test_no_pictures_give_no_patches() -> None:
    assert load_patches([], tiny_vision()).shape == (0, 3, 14, 14)


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
