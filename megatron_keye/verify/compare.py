"""How far two dumps are apart, and where: the array, its layer and its entry."""

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
    """The array, as name[layer] when it is one layer's."""
    largest: float
    """Infinite where one side holds NaN and the other does not."""
    where: tuple[int, ...]
    """Index of the entry with the largest difference; empty for an array without entries."""
    ours: float
    """That entry on our side."""
    theirs: float
    """The same on the other."""
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
        by_layer: Whether each layer of a layered array is told apart.

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
    """Return the worst of `deviations` in proportion to its scale, the first of equals."""
    return max(deviations, key=lambda deviation: deviation.largest / deviation.scale)


def _deviation(name: str, mine: NDArray[Any], other: NDArray[Any]) -> Deviation:
    if mine.size == 0:
        return Deviation(name, 0.0, (), 0.0, 0.0)
    ours, theirs = mine.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(ours - theirs)
    is_same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    apart = np.where(is_same, 0.0, np.where(np.isnan(apart), np.inf, apart))
    where = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
    scale = max(1.0, float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)))
    return Deviation(
        name, float(apart[where]), where, float(ours[where]), float(theirs[where]), scale
    )
