# SPDX-License-Identifier: Apache-2.0
"""Documents whose tokens branch: one prompt with many answers behind it, each answer as if alone.

A document is then a prefix tree. Its branches lie in the row parent before child, and all that
descends from a branch before whatever follows it. A token sees those on its path, from the start
of its document to itself. Two numbers say which these are, whatever the depth: the place of the
token that sees, and for the token that is seen the end of all that descends from it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PrefixTrees:
    """The branches of all documents of a row, padding included.

    Raises:
        ValueError: If they do not cover a row from 0 on, or a branch lies elsewhere than behind
            its parent and what else descends from that.
    """

    bounds: NDArray[np.int64]
    """Where branches start and end [branches + 1]: 0, ..., T."""
    parents: NDArray[np.int64]
    """Index of the branch that each goes on from [branches]; -1 where a document begins."""

    def __post_init__(self) -> None:
        """Check the order, by which alone a token's descendants lie side by side."""
        if len(self.bounds) != len(self.parents) + 1 or self.bounds[0] != 0:
            raise ValueError(
                f"got bounds {self.bounds.tolist()} of {len(self.parents)} branches, expected one "
                "more bound than branches, from 0 on"
            )
        if (self.lengths <= 0).any():
            raise ValueError(f"got a branch without tokens in bounds {self.bounds.tolist()}")
        path: list[int] = []
        for branch, parent in enumerate(self.parents.tolist()):
            while path and path[-1] != parent:
                path.pop()
            if parent >= 0 and not path:
                raise ValueError(
                    f"branch {branch}: got parent {parent}, expected a branch on the path of the "
                    "branch before it, or -1; lay out all that descends from a branch behind it"
                )
            path.append(branch)

    @classmethod
    def of_documents(cls, document_bounds: NDArray[np.int64]) -> Self:
        """Return documents that do not branch, from where they start and end."""
        parents = np.full(len(document_bounds) - 1, -1, dtype=np.int64)
        return cls(bounds=document_bounds, parents=parents)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each branch."""
        return np.diff(self.bounds)

    @cached_property
    def num_earlier(self) -> NDArray[np.int64]:
        """Tokens before each branch on its path."""
        num_earlier = np.zeros_like(self.parents)
        lengths = self.lengths
        for branch, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                num_earlier[branch] = num_earlier[parent] + lengths[parent]
        return num_earlier

    @property
    def longest_path(self) -> int:
        """Tokens of the longest path, which is a document as it is without branches."""
        return int((self.num_earlier + self.lengths).max())

    @cached_property
    def key_reach(self) -> NDArray[np.int64]:
        """For each token one past the last one that descends from it, or itself, int64 [T]."""
        ends = self.bounds[1:].copy()
        for branch, parent in reversed(list(enumerate(self.parents.tolist()))):
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[branch])
        return np.repeat(ends, self.lengths)

    @cached_property
    def num_paths(self) -> NDArray[np.int64]:
        """For each token the paths that lead through it to their end, int64 [T].

        So many rows of one path each would hold it.
        """
        num_paths = np.zeros_like(self.parents)
        for branch, parent in reversed(list(enumerate(self.parents.tolist()))):
            num_paths[branch] = max(1, num_paths[branch])
            if parent >= 0:
                num_paths[parent] += num_paths[branch]
        return np.repeat(num_paths, self.lengths)

    @property
    def document_bounds(self) -> NDArray[np.int64]:
        """Where documents start and end [documents + 1]: 0, ..., T."""
        starts = self.bounds[:-1][self.parents < 0]
        return np.append(starts, self.bounds[-1])
