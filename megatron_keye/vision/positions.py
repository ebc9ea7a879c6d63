"""Learned absolute positions, stretched from their square table to any grid.

The table was learned at one image size; frames keep their native resolution.

Shape letters: P patches, W vision hidden size, N frames.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megatron_keye.vision.grids import Grid, equal_runs


def interpolate_positions(table: Tensor, grid: Grid) -> Tensor:
    """Return the positions of one frame [height * width, W], in the table's type.

    Bilinear, align_corners off, no antialiasing even when shrinking, as the released code does.

    Args:
        table: [side * side, W], raster order.
        grid: Patches down and across; at the table's own size the result is the table.
    """
    side = math.isqrt(table.shape[0])
    square = table.T.reshape(1, table.shape[1], side, side)
    stretched = functional.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    return stretched.flatten(2)[0].T


def packed_positions(table: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Return the positions of all patches [P, W] of frames packed one behind the other."""
    made = {grid: interpolate_positions(table, grid) for grid in set(grids)}
    pieces = [made[grid].repeat(num_frames, 1) for grid, num_frames in equal_runs(grids)]
    # The empty piece keeps the table in the graph when a rank has no frame to encode.
    return torch.cat([table[:0], *pieces])
