"""Pixels as the vision encoder takes them: resized, normalised, cut into patches.

Only ranks that encode a picture call this, so it starts from `Picture`s, which every rank plans,
and decodes here.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from megatron_keye.config import VisionConfig
from megatron_keye.data.image import decode_image
from megatron_keye.data.row import Picture
from megatron_keye.data.video import iterate_frames


def make_patches(frames: NDArray[np.uint8], grid: tuple[int, int], patch_size: int) -> Tensor:
    """Resize frames to a grid of patches, normalise and cut them.

    Resizing is torch's antialiased bicubic on uint8, across first, then down, as the published
    preprocessing of the Keye and Qwen families does for videos; Pillow's agrees within 1 of 255 on
    natural pictures. Values become (x / 255 - 0.5) / 0.5, from -1 to 1.

    Args:
        frames: uint8 RGB [frames, height, width, 3].
        grid: Patches down and across.
        patch_size: Side of a patch in pixels.

    Returns:
        float32 [frames * down * across, 3, patch_size, patch_size] on the CPU; frame after frame,
        in raster order within each.
    """
    rows, columns = grid
    size = (rows * patch_size, columns * patch_size)
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if tuple(pixels.shape[2:]) != size:
        pixels = interpolate(pixels, size=size, mode="bicubic", antialias=True)
    cut = pixels.reshape(len(frames), 3, rows, patch_size, columns, patch_size)
    patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, patch_size, patch_size)
    return patches.float().div_(127.5).sub_(1.0)


def load_patches(pictures: Sequence[Picture], vision: VisionConfig) -> Tensor:
    """Decode pictures and return their patches.

    Each file is decoded once, however its frames are spread over `pictures`; beside the result,
    one decoded frame at a time is held.

    Args:
        pictures: Planned images and frames, in any order, repeats allowed.
        vision: Patch and merge size.

    Returns:
        float32 [sum of num_patches, 3, patch_size, patch_size], pictures in the order given.

    Raises:
        ValueError: Naming the file that cannot be decoded.
    """
    ends = np.cumsum([picture.num_patches for picture in pictures], dtype=np.int64).tolist()
    side = vision.patch_size
    patches = torch.empty(ends[-1] if ends else 0, 3, side, side)
    by_media: dict[tuple[str, bool], dict[int, list[int]]] = {}
    for place, picture in enumerate(pictures):
        places = by_media.setdefault((picture.media, picture.is_video), {})
        places.setdefault(picture.frame, []).append(place)
    for (media, is_video), places in by_media.items():
        for frame, pixels in _decoded(media, is_video, places):
            for place in places[frame]:
                picture = pictures[place]
                made = make_patches(pixels[None], picture.grid, side)
                patches[ends[place] - picture.num_patches : ends[place]] = made
    return patches


def _decoded(
    media: str, is_video: bool, places: Mapping[int, object]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (frame index, uint8 RGB [height, width, 3]) of the wanted frames of one file."""
    if is_video:
        yield from iterate_frames(Path(media), places)
    else:
        assert set(places) == {0}, f"{media}: an image has only frame 0, got {sorted(places)}"
        yield 0, decode_image(Path(media))
