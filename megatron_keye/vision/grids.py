"""Frames packed one behind the other, described by their grids of patches.

Neighbouring frames of one video have one size; handled as a run, they cost one call instead of
one a frame.

Shape letters: P patches, W vision hidden size, N frames.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor

Grid = tuple[int, int]
"""Patches down and across one frame."""


def equal_runs(grids: Sequence[Grid]) -> list[tuple[Grid, int]]:
    """Return the runs of neighbouring frames of equal size, as (grid, number of frames)."""
    return [(grid, len(list(frames))) for grid, frames in groupby(grids)]


def num_patches(grids: Sequence[Grid]) -> int:
    """Return the patches P of all frames together."""
    return sum(height * width for height, width in grids)


def split_runs(packed: Tensor, grids: Sequence[Grid]) -> Iterator[tuple[Grid, Tensor]]:
    """Yield each run of equal frames as its grid and its part [N, height * width, ...].

    Args:
        packed: [P, ...], frames one behind the other, each in raster order.
        grids: Grid of every frame, in the order of `packed`.
    """
    runs = equal_runs(grids)
    sizes = [height * width * num_frames for (height, width), num_frames in runs]
    for (grid, num_frames), part in zip(runs, packed.split(sizes), strict=True):
        yield grid, part.unflatten(0, (num_frames, grid[0] * grid[1]))


def check_grids(packed: Tensor, grids: Sequence[Grid], name: str, multiple: int = 1) -> None:
    """Raise unless `grids` account for exactly the patches of `packed`.

    Args:
        packed: [P, ...].
        grids: Grid of every frame.
        name: What `packed` is called, for the message.
        multiple: What the sides of every grid must be divisible by.

    Raises:
        ValueError: When the patches do not add up, or a side is not a positive multiple.
    """
    for index, (height, width) in enumerate(grids):
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"grid of frame {index}: got {height} x {width} patches, expected positive "
                f"multiples of {multiple}; resize the frame to a whole number of tokens"
            )
    if packed.shape[0] != num_patches(grids):
        raise ValueError(
            f"{name}: got {packed.shape[0]} patches, expected {num_patches(grids)} as the "
            f"{len(grids)} grids add up to; pass the grids of these very patches"
        )
