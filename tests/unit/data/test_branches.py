# SPDX-License-Identifier: Apache-2.0
"""Branched samples become rows in which every position has one label and every token its place."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_keye.data.branches import Branch, BranchedSample, pack_branches
from megatron_keye.data.row import IGNORED_LABEL
from megatron_keye.estimate.account import model_flops
from megatron_keye.plan.places import DecoderPlace
from megatron_keye.training.metrics import count_batch
from megatron_keye.training.microbatch import cut_row
from tests.support.tiny import ROW_TOKENS, tiny_run


def branch(*tokens: int, parent: int = -1, weight: float = 1.0) -> Branch:
    """Return a branch whose tokens all count, but the first of a sample."""
    weights = np.full(len(tokens), weight, dtype=np.float32)
    if parent < 0:
        weights[0] = 0
    return Branch(token_ids=np.array(tokens, dtype=np.int64), token_weights=weights, parent=parent)


TREE = BranchedSample(
    name="tree",
    branches=(
        branch(1, 2, 3, weight=0.5),
        branch(4, 5, parent=0),
        branch(6, 7, parent=1),
        branch(8, parent=1),
        branch(9, parent=0),
        branch(10, 11, parent=4),
    ),
)


def test_where_branches_part_the_last_token_is_in_each_of_them() -> None:
    row = pack_branches([TREE, TREE], ROW_TOKENS, pad_token_id=77)
    assert TREE.num_tokens == 13 and row.num_real_tokens == 26
    assert row.token_ids[:13].tolist() == [1, 2, 3, 4, 5, 6, 7, 5, 8, 3, 9, 10, 11]
    assert row.branches.parents.tolist()[:6] == [-1, 0, 1, 1, 0, 4]
    assert row.document_bounds.tolist() == [0, 13, 26, ROW_TOKENS]
    nothing = IGNORED_LABEL
    labels = [2, 3, 4, 5, 6, 7, nothing, 8, nothing, 9, 10, 11, nothing]
    assert row.labels[:13].tolist() == labels
    assert row.weights[:3].tolist() == [0.5, 0.5, 1.0]
    assert row.labels[13:26].tolist() == labels and row.token_ids[26:].tolist() == [77] * 38


def test_a_branch_goes_on_at_the_positions_of_its_path() -> None:
    row = pack_branches([TREE], ROW_TOKENS, pad_token_id=77)
    place = DecoderPlace(tensor=0, context=0, data=0, pipeline=0, expert=0)
    batch = cut_row(row, tiny_run(), place)
    expected = [0, 1, 2, 3, 4, 5, 6, 4, 5, 2, 3, 4, 5, *range(ROW_TOKENS - 13)]
    assert batch.position_ids_3T.tolist() == [expected] * 3
    assert batch.num_paths_T is not None and batch.num_paths_T[:3].tolist() == [3, 3, 2]
    plain = cut_row(replace(row, prefix_trees=None), tiny_run(), place)
    assert plain.num_paths_T is None and plain.key_reach_S is None


def test_counts_are_those_of_rows_of_one_path_each() -> None:
    row = pack_branches([TREE], ROW_TOKENS, pad_token_id=77)
    paths = [(1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5, 8), (1, 2, 3, 9, 10, 11)]
    assert row.num_indexer_queries == sum(map(len, paths))
    assert row.longest_document == ROW_TOKENS - 13, "padding"
    run = tiny_run()
    assert count_batch([row], run).indexer_queries == sum(map(len, paths))
    one_path = replace(row, prefix_trees=None)
    assert 0 < model_flops(run, [row.sizes]) < model_flops(run, [one_path.sizes])


@pytest.mark.parametrize("middle", [branch(4, parent=0), branch(parent=0)])
def test_a_branch_with_too_few_tokens_is_refused(middle: Branch) -> None:
    ends = branch(5, parent=1), branch(6, parent=1)
    sample = BranchedSample(name="sample 3", branches=(branch(1, 2), middle, *ends))
    with pytest.raises(ValueError, match="sample 3: branch 1: got [01] tokens, expected"):
        pack_branches([sample], ROW_TOKENS, pad_token_id=0)
