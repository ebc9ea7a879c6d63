# SPDX-License-Identifier: Apache-2.0
"""Patch grids of packed frames, and runs of consecutive frames of equal size.

Frames of one video have one size; as a run they need one call instead of one per frame.

Shape letters: P patches, W vision hidden size, N frames.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor

PatchGrid = tuple[int, int]
"""Patches down and across one frame."""


def equal_runs(patch_grids: Sequence[PatchGrid]) -> list[tuple[PatchGrid, int]]:
    """Return the runs of consecutive frames of equal size: (patch grid, number of frames)."""
    return [(patch_grid, len(list(frames))) for patch_grid, frames in groupby(patch_grids)]


def num_patches(patch_grids: Sequence[PatchGrid]) -> int:
    """Return P, the number of patches of all frames."""
    return sum(height * width for height, width in patch_grids)


def split_runs(
    packed: Tensor, patch_grids: Sequence[PatchGrid]
) -> Iterator[tuple[PatchGrid, Tensor]]:
    """Yield the patch grid and the part [N, height * width, ...] of each run of equal frames.

    Args:
        packed: [P, ...], concatenated frames, each in raster order.
        patch_grids: Patches down and across each frame, in the order of `packed`.
    """
    runs = equal_runs(patch_grids)
    sizes = [height * width * num_frames for (height, width), num_frames in runs]
    for (patch_grid, num_frames), part in zip(runs, packed.split(sizes), strict=True):
        yield patch_grid, part.unflatten(0, (num_frames, patch_grid[0] * patch_grid[1]))


def check_patch_grids(
    packed: Tensor, patch_grids: Sequence[PatchGrid], name: str, multiple: int = 1
) -> None:
    """Raise unless `patch_grids` account for exactly the patches of `packed`.

    Args:
        packed: [P, ...].
        patch_grids: Patches down and across each frame.
        name: Name of `packed` in the message.
        multiple: Divisor of both sides of every patch grid.

    Raises:
        ValueError: When the number of patches differs, or a side is not a positive multiple.
    """
    for index, (height, width) in enumerate(patch_grids):
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"patch_grid of frame {index}: got {height} x {width} patches, expected positive "
                f"multiples of {multiple}; resize the frame to a whole number of tokens"
            )
    if packed.shape[0] != num_patches(patch_grids):
        raise ValueError(
            f"{name}: got {packed.shape[0]} patches, expected {num_patches(patch_grids)} as the "
            f"{len(patch_grids)} patch_grids add up to; pass the patch_grids of these patches"
        )
