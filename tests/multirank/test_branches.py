# SPDX-License-Identifier: Apache-2.0
"""A row whose documents branch trains as rows of one path each, in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_keye.config import RunConfig
from megatron_keye.data.branches import Branch, BranchedSample, branch_of, pack_branches
from megatron_keye.data.row import PackedRow, Sample, labels_of
from megatron_keye.post_training.rows import Answer, share_prompt
from tests.support.float64 import TOLERANCE, assert_trains_as, exact_run, without_trees
from tests.support.tiny import ROW_TOKENS, packed_row

PHASES = [
    pytest.param({"recompute": "full"}, id="sparse"),
    pytest.param({"phase": "indexer_warmup"}, id="warm-up"),
    pytest.param({"recompute": "none"}, id="sparse, nothing recomputed", marks=pytest.mark.slow),
    pytest.param({"recompute": "selective"}, id="sparse, kept outputs", marks=pytest.mark.slow),
    pytest.param({"phase": "dense"}, id="dense", marks=pytest.mark.slow),
]
TWO_RANKS = [
    pytest.param({}, {"context": 2, "expert": 2}, id="context, expert"),
    pytest.param({}, {"tensor": 2, "expert": 2}, id="tensor, expert"),
    pytest.param(
        {"phase": "indexer_warmup"}, {"context": 2}, id="warm-up, context", marks=pytest.mark.slow
    ),
    pytest.param({"phase": "dense"}, {"context": 2}, id="dense, context", marks=pytest.mark.slow),
]


def video_prompt() -> Sample:
    """Return a prompt of two frames and text, without labels."""
    row = packed_row(5, (8, ((4, 4), (2, 4))))
    token_ids = row.token_ids[: row.num_real_tokens]
    nothing = np.zeros(len(token_ids), dtype=np.float32)
    return Sample(
        name="prompt",
        token_ids=token_ids,
        labels=labels_of(token_ids, nothing),
        weights=nothing,
        pictures=row.pictures,
        picture_starts=row.picture_starts,
    )


def answers_to_it(*lengths: int) -> list[Answer]:
    """Return random answers; one token of each does not count."""
    generator = np.random.default_rng(7)
    answers = []
    for length in lengths:
        weights = generator.uniform(0.5, 2, length).astype(np.float32)
        weights[length // 2] = 0
        answers.append(Answer(token_ids=generator.integers(0, 90, length), weights=weights))
    return answers


def branching_turns() -> tuple[PackedRow, list[PackedRow]]:
    """Return a row of a prompt, two turns behind it and two behind each, and one of each path."""
    generator = np.random.default_rng(8)

    def turn(length: int, parent: int, weight: float) -> Branch:
        weights = np.full(length, weight, dtype=np.float32)
        return Branch(
            token_ids=generator.integers(0, 90, length), token_weights=weights, parent=parent
        )

    start = branch_of(video_prompt())
    leaves = [turn(5, 1, 1), turn(7, 1, 1), turn(4, 4, 1), turn(6, 4, 1)]
    first, second = turn(6, 0, 2), turn(3, 0, 2)
    tree = (start, first, *leaves[:2], second, *leaves[2:])
    shared = pack_branches(
        [BranchedSample(name="tree", branches=tree)], ROW_TOKENS, pad_token_id=0
    )
    alone = []
    for number, leaf in enumerate(leaves):
        middle = first if number < 2 else second
        # What two paths share weighs as much as in both.
        halved = replace(middle, token_weights=middle.token_weights / 2)
        path = (start, halved, replace(leaf, parent=1))
        sample = BranchedSample(name=f"path {number}", branches=path)
        alone.append(pack_branches([sample], ROW_TOKENS, pad_token_id=0))
    return shared, alone


def assert_answers_train_as_alone(run: RunConfig) -> None:
    """Compare a shared row with a row for each answer, log-probabilities of tokens included."""
    prompt, answers = video_prompt(), answers_to_it(7, 1, 11, 9)
    (shared, *alone) = [
        pack_branches([each.sample], ROW_TOKENS, pad_token_id=0)
        for name, some in zip(" abcd", (answers, *([one] for one in answers)), strict=True)
        for each in share_prompt(replace(prompt, name=name), some, ROW_TOKENS)
    ]
    mine, theirs = assert_trains_as(run, [shared], [without_trees(row) for row in alone])
    # By row and position, which is answer by answer.
    expected = [loss for _, loss in sorted(theirs.items())]
    assert len(expected) == sum(np.count_nonzero(answer.weights) for answer in answers)
    np.testing.assert_allclose(
        [loss for _, loss in sorted(mine.items())], expected, rtol=TOLERANCE, atol=0
    )


@pytest.mark.parametrize("training", PHASES)
def test_answers_behind_one_prompt_train_as_rows_of_their_own(training: dict[str, Any]) -> None:
    assert_answers_train_as_alone(exact_run(training))


@pytest.mark.parametrize(("training", "degrees"), TWO_RANKS)
def test_they_do_so_on_two_ranks(training: dict[str, Any], degrees: dict[str, int]) -> None:
    assert_answers_train_as_alone(exact_run(training, **degrees))


def test_branches_of_branches_train_as_their_paths() -> None:
    shared, alone = branching_turns()
    run = exact_run(context=2)
    assert_trains_as(run, [shared], [without_trees(row) for row in alone])
