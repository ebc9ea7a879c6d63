# SPDX-License-Identifier: Apache-2.0
"""Compares two dumps: the largest deviation of each array or layer, and where it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_keye.errors import UserError

Arrays = Mapping[str, NDArray[Any]]

LAYERED = ("hidden", "topk_indices", "sparse_kl", "warmup_kl")
"""Arrays of a dump whose first dimension is the layer."""


@dataclass(frozen=True)
class Deviation:
    """The largest absolute difference within one array, or within one layer of it."""

    name: str
    """Name of the array; name[layer] for one layer."""
    largest: float
    """Infinite where one side holds NaN and the other does not."""
    where: tuple[int, ...]
    """Index of the entry with the largest difference; empty for an array without entries."""
    ours: float
    """Our value of that entry."""
    theirs: float
    """The other side's value."""
    scale: float = 1.0
    """The other side's largest finite magnitude, or 1 where all is smaller."""

    def is_within(self, tolerance: float) -> bool:
        """Return whether the difference is at most `tolerance` times the scale."""
        return self.largest <= tolerance * self.scale

    def __str__(self) -> str:
        place = ", ".join(map(str, self.where))
        return (
            f"{self.name}: largest deviation {self.largest:.3e} at [{place}], "
            f"{self.ours:.9g} against {self.theirs:.9g}"
        )


def compare(ours: Arrays, theirs: Arrays, *, by_layer: bool = False) -> list[Deviation]:
    """Return the deviation of every array that both sides hold, in the order of `theirs`.

    Args:
        ours: One dump.
        theirs: Another.
        by_layer: Whether each layer of a layered array is compared on its own.

    Raises:
        UserError: When two arrays of one name differ in shape, or no name is on both sides.
    """
    shared = [name for name in theirs if name in ours]
    if not shared:
        raise UserError(
            f"comparison: got {', '.join(ours)} against {', '.join(theirs)}, expected at least "
            "one array of the same name; dump both with the same inputs"
        )
    found: list[Deviation] = []
    for name in shared:
        mine, other = ours[name], theirs[name]
        if mine.shape != other.shape:
            raise UserError(
                f"{name}: got shape {list(mine.shape)} against {list(other.shape)}, expected one "
                "shape; compare models of one size on the same inputs"
            )
        if by_layer and name in LAYERED:
            found += [_deviation(f"{name}[{n}]", mine[n], other[n]) for n in range(len(mine))]
        else:
            found.append(_deviation(name, mine, other))
    return found


def largest(deviations: list[Deviation]) -> Deviation:
    """Return the largest of `deviations` relative to its scale; ties go to the first."""
    return max(deviations, key=lambda deviation: deviation.largest / deviation.scale)


def _deviation(name: str, mine: NDArray[Any], other: NDArray[Any]) -> Deviation:
    if mine.size == 0:
        return Deviation(name, 0.0, (), 0.0, 0.0)
    ours, theirs = mine.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(ours - theirs)
    is_same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    difference = np.where(is_same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    where = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    scale = max(1.0, float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)))
    return Deviation(
        name, float(difference[where]), where, float(ours[where]), float(theirs[where]), scale
    )
