# SPDX-License-Identifier: Apache-2.0
"""The order of samples: sources mixed by weight, each reshuffled every epoch.

The next source follows from the number of samples drawn from each, so these counts are the whole
state.
"""

from collections.abc import Sequence

from megatron_keye.data.permutation import Permutation


def next_source(weights: Sequence[float], num_drawn: Sequence[int]) -> int:
    """Return the source that is furthest behind its share; ties go to the first.

    Args:
        weights: Shares that sum to 1.
        num_drawn: Samples drawn from each source.
    """
    total = sum(num_drawn) + 1
    deficits = [weight * total - drawn for weight, drawn in zip(weights, num_drawn, strict=True)]
    return deficits.index(max(deficits))


class Blend:
    """An endless stream of (source, sample), determined by the seed and the position."""

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffles: bool
    ) -> None:
        """Start at the beginning.

        Args:
            sizes: Samples in each source.
            weights: Shares of the sources, which sum to 1.
            seed: Decides the order of every epoch of every source.
            shuffles: False keeps the order of each source.
        """
        self.num_drawn = [0] * len(sizes)
        """Samples drawn from each source; may be set, to resume at any position."""
        self._sizes, self._weights, self._seed = sizes, weights, seed
        self._shuffles = shuffles
        # One order per source, since making one costs more than a look-up.
        self._orders: dict[int, tuple[int, Permutation]] = {}

    def draw(self) -> tuple[int, int]:
        """Return the next source and the index of a sample in it, and advance."""
        source = next_source(self._weights, self.num_drawn)
        epoch, position = divmod(self.num_drawn[source], self._sizes[source])
        self.num_drawn[source] += 1
        return source, self._order(source, epoch)[position] if self._shuffles else position

    def ends_epoch(self, source: int) -> bool:
        """Return whether the last sample drawn from a source was the last of its epoch."""
        return self.num_drawn[source] % self._sizes[source] == 0

    def _order(self, source: int, epoch: int) -> Permutation:
        """Return the order of one epoch of one source."""
        kept_epoch, order = self._orders.get(source, (-1, None))
        if order is None or kept_epoch != epoch:
            # Source 0 adds nothing to the seed: a source alone is ordered as the first of a blend.
            key = (self._seed, epoch, *([source] if source else []))
            order = Permutation(self._sizes[source], key)
            self._orders[source] = epoch, order
        return order
