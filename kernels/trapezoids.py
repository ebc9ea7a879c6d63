# SPDX-License-Identifier: Apache-2.0
"""Neighbouring queries of one document, each of which sees one key more than the one before.

Their part of the mask is a trapezoid: the keys that all of them see, and a triangle. A whole
causal document is a triangle. A context rank has two trapezoids of a document that spans the row.
Where a document branches, each branch has one, with a gap for the keys of those beside it.
"""

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Trapezoid:
    """Queries from `first_query` on; the t-th sees `num_earlier + t + 1` keys less the gaps."""

    first_query: int
    """Its first query."""
    num_queries: int
    """How many it has."""
    first_key: int
    """First key that all of them see."""
    num_earlier: int
    """Keys before the one that the first query sees last; -1 where no query sees any key."""
    gaps: tuple[slice, ...] = ()
    """Keys among the earlier ones that no query sees, ascending."""

    @property
    def queries(self) -> slice:
        """Its queries."""
        return slice(self.first_query, self.first_query + self.num_queries)

    @property
    def sees_keys(self) -> bool:
        """Whether its queries see any key."""
        return self.num_earlier >= 0

    @property
    def earlier_keys(self) -> list[slice]:
        """The keys that all its queries see before its triangle, ascending."""
        edges = [self.first_key]
        for gap in self.gaps:
            edges += [gap.start, gap.stop]
        edges.append(self.first_key + self.num_earlier)
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [slice(first, stop) for first, stop in pairs if first < stop]

    @property
    def triangle_keys(self) -> slice:
        """As many keys as queries, of which the t-th query sees the first t + 1."""
        first = self.first_key + self.num_earlier
        return slice(first, first + self.num_queries)


@dataclass(frozen=True)
class _Answer:
    """What a row was asked with beside the ends of its ranges, and what was found."""

    key_start: weakref.ref[Tensor]
    key_reach: weakref.ref[Tensor] | None
    versions: tuple[int, int]
    trapezoids: list[Trapezoid]

    def answers(self, key_start_T: Tensor, key_end_T: Tensor, key_reach_S: Tensor | None) -> bool:
        """Return whether it was asked with the same tensors, unchanged."""
        reach = None if self.key_reach is None else self.key_reach()
        is_same = self.key_start() is key_start_T and reach is key_reach_S
        return is_same and self.versions == (key_start_T._version, key_end_T._version)


_remembered: MutableMapping[Tensor, _Answer] = WeakTensorKeyDictionary()
"""By the ends of ranges: all layers of a row ask again."""


def find_trapezoids(
    key_start_T: Tensor, key_end_T: Tensor, key_reach_S: Tensor | None = None
) -> list[Trapezoid]:
    """Return the fewest trapezoids that all queries make up, in order.

    Reads the answer back to the host, once for each `key_end_T`.

    Args:
        key_start_T: int64, first visible key of each query.
        key_end_T: int64, one past the last visible key.
        key_reach_S: As `find_visible` takes it; of branches that lie in the row as it says there.
    """
    known = _remembered.get(key_end_T)
    if known is not None and known.answers(key_start_T, key_end_T, key_reach_S):
        return known.trapezoids
    trapezoids = _find(key_start_T, key_end_T, key_reach_S) if len(key_end_T) else []
    _remembered[key_end_T] = _Answer(
        weakref.ref(key_start_T),
        None if key_reach_S is None else weakref.ref(key_reach_S),
        (key_start_T._version, key_end_T._version),
        trapezoids,
    )
    return trapezoids


def _find(key_start_T: Tensor, key_end_T: Tensor, key_reach_S: Tensor | None) -> list[Trapezoid]:
    sees_keys_T = key_end_T > key_start_T
    continues_T = (key_start_T[1:] == key_start_T[:-1]) & (key_end_T[1:] == key_end_T[:-1] + 1)
    if key_reach_S is not None and len(key_reach_S):
        # The key that the earlier query sees last is itself, which the next one must see.
        continues_T &= key_end_T[1:] <= key_reach_S[(key_end_T[:-1] - 1).clamp(min=0)]
    is_same_T = sees_keys_T[1:] == sees_keys_T[:-1]
    begins_T = ~(is_same_T & (continues_T | ~sees_keys_T[1:]))
    first_R = torch.cat([begins_T.new_ones(1), begins_T]).nonzero().flatten()
    earlier_R = (key_end_T - 1 - key_start_T).clamp(min=-1)[first_R]
    columns = torch.stack([first_R, key_start_T[first_R], earlier_R]).tolist()
    ends = [*columns[0][1:], len(key_end_T)]
    branches = [] if key_reach_S is None else _list_branches(key_reach_S)
    return [
        Trapezoid(first, end - first, key, earlier, _find_gaps(branches, key, key + earlier))
        for first, key, earlier, end in zip(*columns, ends, strict=True)
    ]


def _list_branches(key_reach_S: Tensor) -> list[tuple[int, int, int]]:
    """Return first key, end and reach of each run of keys of one reach."""
    is_first_S = torch.ones_like(key_reach_S, dtype=torch.bool)
    is_first_S[1:] = key_reach_S[1:] != key_reach_S[:-1]
    first_R = is_first_S.nonzero().flatten()
    firsts, reaches = torch.stack([first_R, key_reach_S[first_R]]).tolist()
    return list(zip(firsts, [*firsts[1:], len(key_reach_S)], reaches, strict=True))


def _find_gaps(
    branches: list[tuple[int, int, int]], first_key: int, query_key: int
) -> tuple[slice, ...]:
    """Return the keys from `first_key` on that the query at `query_key` does not see."""
    gaps = list[slice]()
    for first, end, reach in branches:
        first, end = max(first, first_key), min(end, query_key)
        if first >= end or reach > query_key:
            continue
        if gaps and gaps[-1].stop == first:
            first = gaps.pop().start
        gaps.append(slice(first, end))
    return tuple(gaps)
