# SPDX-License-Identifier: Apache-2.0
"""Corrects colours of BT.709 video that was converted to RGB as BT.601.

DALI converts all video as BT.601; most high-definition video is BT.709, and its greens and reds
would be off by up to 25 of 255.
"""

from functools import lru_cache

import torch
from torch import Tensor

BT709 = 1
"""FFmpeg's number of the colour space; the others that reach a GPU are BT.601."""


def to_space_of(frames: Tensor, color_space: int) -> Tensor:
    """Return RGB as if it had been converted from its own colour space instead of BT.601.

    Exact up to rounding where BT.601 did not clip; a colour outside its gamut, for example pure
    red, becomes some levels too dull.

    Args:
        frames: uint8 RGB [..., height, width, 3], converted by BT.601.
        color_space: FFmpeg's number of the video's colour space.

    Returns:
        uint8 RGB of the same shape.
    """
    if color_space != BT709:
        return frames
    converted = frames.float() @ _from_601_to_709(frames.device)
    return converted.round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def _from_601_to_709(device: torch.device) -> Tensor:
    """Return [3, 3], right-hand factor of rows of RGB."""
    from_rgb = torch.linalg.inv(_to_rgb(red=0.299, blue=0.114))
    matrix = torch.matmul(_to_rgb(red=0.2126, blue=0.0722), from_rgb)
    return matrix.T.to(device, torch.float32)


def _to_rgb(*, red: float, blue: float) -> Tensor:
    """Return the matrix from luma and colour differences to RGB, by the weights in the luma.

    Source: ITU-R BT.601 and BT.709, sections on the derivation of luminance and colour difference.
    """
    green = 1 - red - blue
    from_red, from_blue = 2 * (1 - red), 2 * (1 - blue)
    return torch.tensor(
        [
            [1.0, 0.0, from_red],
            [1.0, -from_blue * blue / green, -from_red * red / green],
            [1.0, from_blue, 0.0],
        ],
        dtype=torch.float64,
    )
