"""Neighbouring queries of one document, each of which sees one key more than the one before.

Their part of the mask is a trapezoid: the keys that all of them see, and a triangle. A whole
causal document is a triangle. A context rank has two trapezoids of a document that spans the row.
"""

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Trapezoid:
    """Queries from `first_query` on; the t-th of them sees `num_earlier + t + 1` keys."""

    first_query: int
    """Its first query."""
    num_queries: int
    """How many it has."""
    first_key: int
    """First key that all of them see."""
    num_earlier: int
    """Keys before the one that the first query sees last; -1 where no query sees any key."""

    @property
    def queries(self) -> slice:
        """Its queries."""
        return slice(self.first_query, self.first_query + self.num_queries)

    @property
    def keys(self) -> slice:
        """The keys that its last query sees."""
        num_keys = self.num_earlier + self.num_queries if self.sees_keys else 0
        return slice(self.first_key, self.first_key + num_keys)

    @property
    def sees_keys(self) -> bool:
        """Whether its queries see any key."""
        return self.num_earlier >= 0


_Asked = tuple[weakref.ref[Tensor], int, int]
_remembered: MutableMapping[Tensor, tuple[_Asked, list[Trapezoid]]] = WeakTensorKeyDictionary()
"""Ends of ranges -> (starts and versions, trapezoids): all layers of a row ask again."""


def find_trapezoids(key_start_T: Tensor, key_end_T: Tensor) -> list[Trapezoid]:
    """Return the fewest trapezoids that all queries make up, in order.

    Reads the answer back to the host, once for each `key_end_T`.

    Args:
        key_start_T: int64, first visible key of each query.
        key_end_T: int64, one past the last visible key.
    """
    asked = weakref.ref(key_start_T), key_start_T._version, key_end_T._version
    known = _remembered.get(key_end_T)
    if known is not None and known[0][0]() is key_start_T and known[0][1:] == asked[1:]:
        return known[1]
    trapezoids = _find(key_start_T, key_end_T) if len(key_end_T) else []
    _remembered[key_end_T] = asked, trapezoids
    return trapezoids


def _find(key_start_T: Tensor, key_end_T: Tensor) -> list[Trapezoid]:
    sees_keys_T = key_end_T > key_start_T
    continues_T = (key_start_T[1:] == key_start_T[:-1]) & (key_end_T[1:] == key_end_T[:-1] + 1)
    is_same_T = sees_keys_T[1:] == sees_keys_T[:-1]
    begins_T = ~(is_same_T & (continues_T | ~sees_keys_T[1:]))
    first_R = torch.cat([begins_T.new_ones(1), begins_T]).nonzero().flatten()
    earlier_R = (key_end_T - 1 - key_start_T).clamp(min=-1)[first_R]
    columns = torch.stack([first_R, key_start_T[first_R], earlier_R]).tolist()
    ends = [*columns[0][1:], len(key_end_T)]
    return [
        Trapezoid(first, end - first, key, earlier)
        for first, key, earlier, end in zip(*columns, ends, strict=True)
    ]
