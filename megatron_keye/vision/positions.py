# SPDX-License-Identifier: Apache-2.0
"""Learned absolute positions, interpolated from a square table to any patch grid.

The table was learned at one image size; frames have their native resolution.

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
        patch_grid: Patches down and across; (side, side) returns the table itself.
    """
    side = math.isqrt(table.shape[0])
    square = table.T.reshape(1, table.shape[1], side, side)
    stretched = functional.interpolate(
        square, size=patch_grid, mode="bilinear", align_corners=False
    )
    return stretched.flatten(2)[0].T


def packed_positions(table: Tensor, patch_grids: Sequence[PatchGrid]) -> Tensor:
    """Return the positions [P, W] of all patches of packed frames."""
    interpolated = {
        patch_grid: interpolate_positions(table, patch_grid) for patch_grid in set(patch_grids)
    }
    parts = [
        interpolated[patch_grid].repeat(num_frames, 1)
        for patch_grid, num_frames in equal_runs(patch_grids)
    ]
    # The empty slice keeps the table in the graph when there is no frame.
    return torch.cat([table[:0], *parts])
