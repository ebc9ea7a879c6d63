"""Which sample comes next: several sources mixed by weight, each in a new order every epoch.

The next choice follows from how many samples each source has given, so a few counts are all the
state there is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def next_source(weights: Sequence[float], num_drawn: Sequence[int]) -> int:
    """Choose the source that is furthest behind its share; the earlier one of equals.

    Args:
        weights: Shares that add up to 1.
        num_drawn: Samples that each source has given.
    """
    total = sum(num_drawn) + 1
    behind = [weight * total - drawn for weight, drawn in zip(weights, num_drawn, strict=True)]
    return behind.index(max(behind))


class Blend:
    """An endless stream of (source, sample), a function of the seed and the position alone."""

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffles: bool
    ) -> None:
        """Start at the beginning.

        Args:
            sizes: Samples in each source.
            weights: Shares of the sources, adding up to 1.
            seed: Decides the order of every epoch of every source.
            shuffles: False takes the samples of a source as they lie.
        """
        self.num_drawn = [0] * len(sizes)
        """Samples that each source has given; may be set, to continue anywhere."""
        self._sizes, self._weights, self._seed = sizes, weights, seed
        self._shuffles = shuffles
        # One order a source, so that a small source's many epochs never push out a large one's.
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def draw(self) -> tuple[int, int]:
        """Return the next source and the index of a sample in it, and move on."""
        source = next_source(self._weights, self.num_drawn)
        epoch, place = divmod(self.num_drawn[source], self._sizes[source])
        self.num_drawn[source] += 1
        return source, int(self._order(source, epoch)[place]) if self._shuffles else place

    def _order(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Return the order of one epoch of one source: 8 bytes a sample."""
        kept_epoch, order = self._orders.get(source, (-1, None))
        if order is None or kept_epoch != epoch:
            # The first source takes no number of its own, so that one alone keeps its order.
            generator = np.random.default_rng((self._seed, epoch, *([source] if source else [])))
            order = generator.permutation(self._sizes[source])
            self._orders[source] = epoch, order
        return order
