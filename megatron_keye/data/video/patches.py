# SPDX-License-Identifier: Apache-2.0
"""Pixels as the vision encoder takes them: resized, normalised, cut into patches.

Computed where the pixels are. Results of the CPU and of an H100 differ by 2 of 255 at most.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def make_patches(frames: Tensor, patch_grid: tuple[int, int], patch_size: int) -> Tensor:
    """Resize frames to a grid of patches, normalise and cut them.

    Resizing is torch's antialiased bicubic on uint8, across first, then down, as the published
    preprocessing of the Keye and Qwen families does for videos; Pillow's agrees within 1 of 255 on
    natural images. Values become (x / 255 - 0.5) / 0.5, from -1 to 1.

    Args:
        frames: uint8 RGB [frames, height, width, 3].
        patch_grid: Patches down and across.
        patch_size: Side of a patch in pixels.

    Returns:
        float32 [frames * down * across, 3, patch_size, patch_size] on the frames' device; frame
        after frame, in raster order within each.
    """
    rows, columns = patch_grid
    pixels = _resize(frames.permute(0, 3, 1, 2), (rows * patch_size, columns * patch_size))
    cut = pixels.reshape(len(frames), 3, rows, patch_size, columns, patch_size)
    patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, patch_size, patch_size)
    return normalise(patches)


def normalise(pixels: Tensor) -> Tensor:
    """Return bytes of any shape as `make_patches` gives them: float32 from -1 to 1."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_bytes(normalised: Tensor) -> Tensor:
    """Return the bytes that were normalised, exactly."""
    return normalised.add(1.0).mul_(127.5).round_().to(torch.uint8)


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [frames, 3, height, width]."""
    if tuple(pixels.shape[2:]) == size:
        return pixels
    if pixels.device.type == "cpu":
        return interpolate(pixels, size=size, mode="bicubic", antialias=True)
    # torch resizes no bytes on a GPU; one axis at a time, with the CPU's rounding in between.
    across = _resize_floats(pixels, (pixels.shape[2], size[1]))
    return _resize_floats(across, size)


def _resize_floats(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize through float32, which all devices can, and round back to bytes."""
    resized = interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
