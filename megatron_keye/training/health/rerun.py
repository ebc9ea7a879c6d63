# SPDX-License-Identifier: Apache-2.0
"""Compares two computations of one step from the same weights, rows and random numbers.

Equal results mean that data or state is the reason of what they show; unequal ones that a device
computed something else once, and the ranks whose own sums differ say where. Megatron's rerun state
machine does the same for one value at a time, in global state, and saves and ends the job to try
other devices; here a step's rows and weights stay as they are until it is judged, so that two
tables of figures are enough.
"""

import math
from dataclasses import dataclass

from megatron_keye.optim.measured import Figure, Measured
from megatron_keye.training.health.wording import first_of

_OWN: tuple[Figure, ...] = ("loss", "indexer KL", "own gradients")
"""Figures that a rank computes by itself, before it reduces them with others."""


@dataclass(frozen=True)
class Comparison:
    """How two computations of one step differ."""

    difference: float
    """Largest relative difference of a figure; 0 for the same bits, infinite if only one of both
    is a finite number."""
    ranks: list[int]
    """Ranks whose own figures differ by more than the tolerance."""
    is_reproducible: bool
    """Whether nothing differs by more."""

    def in_words(self, hosts: list[str]) -> str:
        """Return the conclusion.

        Args:
            hosts: Machine of each rank.
        """
        if self.is_reproducible:
            how = f"within {self.difference:.2g}" if self.difference else "to the bit"
            return f"computed again it is the same {how}, so that data or state is the reason"
        places = [f"rank {rank} on {hosts[rank]}" for rank in self.ranks]
        suspect = first_of(places) or "the network between ranks, whose own figures are the same"
        return f"computed again it is another one, so that hardware is suspect: {suspect}"


def compare(first: Measured, second: Measured, tolerance: float) -> Comparison:
    """Compare two computations of one step.

    Args:
        first: Figures of the first.
        second: Figures of the second.
        tolerance: Largest relative difference that counts as none.
    """
    difference, ranks = 0.0, set[int]()
    for figure, values in first.by_rank.items():
        for rank, pair in enumerate(zip(values, second.by_rank[figure], strict=True)):
            apart = _difference(*pair)
            difference = max(difference, apart)
            if apart > tolerance and figure in _OWN:
                ranks.add(rank)
    return Comparison(difference, sorted(ranks), difference <= tolerance)


def _difference(one: float, other: float) -> float:
    """Return the relative difference; NaN equals NaN, and any other number that is not finite."""
    if math.isfinite(one) and math.isfinite(other):
        largest = max(abs(one), abs(other))
        return abs(one - other) / largest if largest else 0.0
    return 0.0 if math.isfinite(one) == math.isfinite(other) else math.inf
