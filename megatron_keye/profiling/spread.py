# SPDX-License-Identifier: Apache-2.0
"""A measured quantity with its spread over repetitions."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and extremes of some measurements."""

    median: float
    low: float
    high: float
    count: int
    """Measurements."""

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Return the spread of measurements, at least one."""
        return Spread(median=median(values), low=min(values), high=max(values), count=len(values))

    def differs_from(self, other: "Spread") -> bool:
        """Return whether two quantities differ by more than their noise.

        They do where the ranges of their measurements do not meet. One measurement has no range,
        so that nothing is said of it.
        """
        if min(self.count, other.count) < 2:
            return False
        return self.low > other.high or other.low > self.high
