# SPDX-License-Identifier: Apache-2.0
"""Lays samples that branch into a row: what is shared once, and behind it each way to go on.

Each position predicts the next token of its path. Where several branches go on from one token it
would predict several, so that token is laid at the start of each of them instead: its copies see
what it sees, at the same place of their paths, and a row has one label at a position as ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.row import IGNORED_LABEL, PackedRow, Picture, Sample
from megatron_keye.plan.prefix_trees import PrefixTrees


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Tokens that begin a sample, or go on from the end of another branch."""

    token_ids: NDArray[np.int64]
    """Token ids [T], at least one."""
    token_weights: NDArray[np.float32]
    """What each token weighs in the loss [T] where it is predicted; 0 where it is not."""
    parent: int = -1
    """Index of the branch that it goes on from; -1 for the start."""
    pictures: tuple[Picture, ...] = ()
    """Pictures in the order of their placeholders."""
    picture_starts: tuple[int, ...] = ()
    """Place of each picture's first placeholder in the branch."""


@dataclass(frozen=True, kw_only=True)
class BranchedSample:
    """A sample whose tokens branch."""

    name: str
    """Where it comes from, for error messages."""
    branches: tuple[Branch, ...]
    """The start, and behind each branch all that goes on from it."""

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes in a row, repeated ones included."""
        return sum(len(each.token_ids) for each in self.branches) + sum(
            count - 1 for count in self.num_children if count > 1
        )

    @property
    def num_children(self) -> list[int]:
        """Branches that go on from each."""
        parents = [each.parent for each in self.branches]
        return [parents.count(branch) for branch in range(len(parents))]


def branch_of(sample: Sample) -> Branch:
    """Return a whole sample as the start of a branched one."""
    return Branch(
        token_ids=sample.token_ids,
        token_weights=np.append(np.float32(0), sample.weights[:-1]),
        pictures=sample.pictures,
        picture_starts=sample.picture_starts,
    )


def pack_branches(
    samples: Sequence[BranchedSample], row_tokens: int, *, pad_token_id: int
) -> PackedRow:
    """Lay branched samples end to end and pad the rest of the row as a document of its own.

    Args:
        samples: Samples that fit into one row together.
        row_tokens: Length of the row.
        pad_token_id: Token of the padding document.

    Raises:
        ValueError: If branches are not in order, or one has too few tokens.
    """
    num_real = sum(sample.num_tokens for sample in samples)
    assert num_real <= row_tokens, f"{num_real} tokens were packed into a row of {row_tokens}"
    writer = _Writer(row_tokens, pad_token_id)
    for sample in samples:
        writer.write(sample)
    return writer.row([sample.name for sample in samples])


class _Writer:
    """Fills one row from left to right."""

    def __init__(self, row_tokens: int, pad_token_id: int) -> None:
        self._token_ids = np.full(row_tokens, pad_token_id, dtype=np.int64)
        self._labels = np.full(row_tokens, IGNORED_LABEL, dtype=np.int64)
        self._weights = np.zeros(row_tokens, dtype=np.float32)
        self._bounds, self._parents = [0], list[int]()
        self._pictures, self._picture_starts = list[Picture](), list[int]()

    def write(self, sample: BranchedSample) -> None:
        """Append a sample."""
        first_branch, forks = len(self._parents), [n > 1 for n in sample.num_children]
        for index, branch in enumerate(sample.branches):
            repeated = branch.token_ids[:0]
            if branch.parent >= 0 and forks[branch.parent]:
                repeated = sample.branches[branch.parent].token_ids[-1:]
            num_own = len(branch.token_ids) - forks[index]
            laid = np.concatenate([repeated, branch.token_ids[:num_own]])
            if len(laid) == 0 or num_own < 0:
                raise ValueError(
                    f"{sample.name}: branch {index}: got {len(branch.token_ids)} tokens, expected "
                    "at least one, and another where several branches go on from it"
                )
            start = self._bounds[-1]
            self._token_ids[start : start + len(laid)] = laid
            self._bounds.append(start + len(laid))
            self._parents.append(first_branch + branch.parent if branch.parent >= 0 else -1)
            own = start + len(repeated)
            self._pictures += branch.pictures
            self._picture_starts += [own + place for place in branch.picture_starts]
            self._label(branch, own - 1)

    def _label(self, branch: Branch, before: int) -> None:
        """Label the positions before a branch's tokens, the first of them `before`."""
        is_predicted = branch.token_weights > 0
        assert branch.parent >= 0 or not is_predicted[0], "nothing precedes a sample's first token"
        positions = before + is_predicted.nonzero()[0]
        self._labels[positions] = branch.token_ids[is_predicted]
        self._weights[positions] = branch.token_weights[is_predicted]

    def row(self, names: Sequence[str]) -> PackedRow:
        """Return the row."""
        num_real, row_tokens = self._bounds[-1], len(self._token_ids)
        if num_real < row_tokens:
            self._bounds.append(row_tokens)
            self._parents.append(-1)
        trees = PrefixTrees(bounds=np.array(self._bounds), parents=np.array(self._parents))
        return PackedRow(
            token_ids=self._token_ids,
            labels=self._labels,
            weights=self._weights,
            document_bounds=trees.document_bounds,
            num_real_tokens=num_real,
            pictures=tuple(self._pictures),
            picture_starts=tuple(self._picture_starts),
            sample_names=tuple(names),
            prefix_trees=trees,
        )
