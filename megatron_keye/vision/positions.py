"""Learned absolute positions, stretched from their square table to any patch_grid.

The table was learned at one image size; frames keep their native resolution.

Shape letters: P patches, W vision hidden size, N frames.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megatron_keye.vision.patch_grids import PatchGrid, equal_runs


def interpolate_positions(table: Tensor, patch_grid: PatchGrid) -> Tensor:
    """Return the positions of one frame [height * width, W], in the table's type.

    Bilinear, align_corners off, no antialiasing even when shrinking, as the released code does.

    Args:
        table: [side * side, W], raster order.
        patch_grid: Patches down and across; at the table's own size the result is the table.
    """
    side = math.isqrt(table.shape[0])
    square = table.T.reshape(1, table.shape[1], side, side)
    stretched = functional.interpolate(
        square, size=patch_grid, mode="bilinear", align_corners=False
    )
    return stretched.flatten(2)[0].T


def packed_positions(table: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
    """Return the positions of all patches [P, W] of frames packed one behind the other."""
    made = {
        patch_grid: interpolate_positions(table, patch_grid) for patch_grid in set(patch_grids)
    }
    parts = [
        made[patch_grid].repeat(num_frames, 1)
        for patch_grid, num_frames in equal_runs(patch_grids)
    ]
    # The empty part keeps the table in the graph when a rank has no frame to encode.
    return torch.cat([table[:0], *parts])
