# SPDX-License-Identifier: Apache-2.0
"""Branches of documents: their order in a row, and what follows for each token."""

import numpy as np
import pytest

from megatron_keye.plan.cost import num_pairs
from megatron_keye.plan.places import owned_positions
from megatron_keye.plan.prefix_trees import PrefixTrees
from tests.support.numerics import BRANCHES, branched_ranges


def trees_of(*branches: tuple[int, int]) -> PrefixTrees:
    """Return the trees of branches, given as tokens and parent."""
    lengths, parents = zip(*branches, strict=True)
    return PrefixTrees(bounds=np.cumsum([0, *lengths]), parents=np.array(parents))


def test_the_reach_of_a_token_ends_where_its_last_descendant_does() -> None:
    _, reach_S, _ = branched_ranges()
    assert trees_of(*BRANCHES).key_reach.tolist() == reach_S.tolist()


def test_paths_are_counted_as_rows_that_hold_one_each() -> None:
    _, _, keys = branched_ranges()
    ends = [query for query in range(len(keys)) if all(query not in k for k in keys[query + 1 :])]
    expected = [sum(token in keys[end] for end in ends) for token in range(len(keys))]
    trees = trees_of(*BRANCHES)
    assert trees.num_paths.tolist() == expected
    assert trees.longest_path == max(map(len, keys))
    starts = trees.num_earlier.tolist()
    assert starts == [len(keys[start]) - 1 for start in trees.bounds[:-1]]
    assert trees.document_bounds.tolist() == [0, 48, 62]


@pytest.mark.parametrize("top_k", [None, 4, 20, 1000])
def test_pairs_are_those_of_the_paths(top_k: int | None) -> None:
    _, _, keys = branched_ranges()
    trees = trees_of(*BRANCHES)
    expected = sum(min(len(seen), top_k or len(seen)) for seen in keys)
    assert num_pairs(trees.lengths, top_k, trees.num_earlier) == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "most"), [(131_072, 2048, 1.02), (32_768, 1024, 1.04), (8192, 1024, 1.3)]
)
def test_context_ranks_have_about_equal_pairs(prompt: int, answer: int, most: float) -> None:
    trees = trees_of((prompt, -1), *[(answer, 0)] * 8)
    before = np.repeat(trees.num_earlier - trees.bounds[:-1], trees.lengths)
    num_seen = np.arange(trees.bounds[-1]) + before + 1
    ranks = [owned_positions(len(num_seen), 8, rank) for rank in range(8)]
    pairs = [num_seen[owned].sum() for owned in ranks]
    assert sum(pairs) == num_pairs(trees.lengths, None, trees.num_earlier)
    assert max(pairs) <= most * np.mean(pairs)


def test_documents_alone_are_paths_of_their_own() -> None:
    trees = PrefixTrees.of_documents(np.array([0, 4, 9]))
    assert trees.key_reach.tolist() == [4] * 4 + [9] * 5
    assert trees.num_paths.tolist() == [1] * 9 and trees.longest_path == 5


@pytest.mark.parametrize(
    ("bounds", "parents", "fault"),
    [
        ([0, 3, 6, 9, 12], [-1, 0, 0, 1], "branch 3: got parent 1"),
        ([0, 3, 6], [-1, 1], "branch 1: got parent 1"),
        ([0, 3, 6, 9], [-1, -1, 0], "branch 2: got parent 0"),
        ([0, 3, 3], [-1, 0], "without tokens"),
        ([1, 3], [-1], "from 0 on"),
        ([0, 3], [-1, 0], "one more bound"),
    ],
)
def test_branches_out_of_order_are_refused(
    bounds: list[int], parents: list[int], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        PrefixTrees(bounds=np.array(bounds), parents=np.array(parents))
