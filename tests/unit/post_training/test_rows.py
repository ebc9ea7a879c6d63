# SPDX-License-Identifier: Apache-2.0
"""Answers share a row with their prompt, and their tokens are its labels."""

import numpy as np
import pytest

from megatron_keye.data.branches import pack_branches
from megatron_keye.data.row import IGNORED_LABEL, Sample, labels_of
from megatron_keye.errors import UserError
from megatron_keye.post_training.answer_rows import LearnedAnswer, answer_rows
from megatron_keye.post_training.rows import Answer, share_prompt


def prompt_of(num_tokens: int) -> Sample:
    """Return a prompt without labels."""
    token_ids, nothing = np.arange(num_tokens), np.zeros(num_tokens, dtype=np.float32)
    return Sample(
        name="clips.jsonl:4",
        token_ids=token_ids,
        labels=labels_of(token_ids, nothing),
        weights=nothing,
        pictures=(),
        picture_starts=(),
    )


def answer_of(length: int) -> Answer:
    """Return an answer whose second token does not count."""
    weights = np.full(length, 1 / length, dtype=np.float32)
    weights[1:2] = 0
    return Answer(token_ids=100 + np.arange(length), weights=weights)


def learned(length: int) -> LearnedAnswer:
    """Return an answer whose advantage is its length."""
    return LearnedAnswer(
        token_ids=(7,) * length,
        first_place=0,
        old_log_probs=np.zeros(length),
        advantage=float(length),
    )


def test_labels_are_the_tokens_that_count_answer_by_answer() -> None:
    answers = [answer_of(length) for length in (3, 1, 2)]
    (found,) = share_prompt(prompt_of(5), answers, 16)
    row = pack_branches([found.sample], 16, pad_token_id=0)
    assert row.token_ids[:13].tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 4, 100, 4, 100, 101]
    is_label = row.labels != IGNORED_LABEL
    assert is_label.nonzero()[0].tolist() == [4, 6, 8, 10]
    assert row.labels[is_label].tolist() == [100, 102, 100, 100]
    assert row.weights[is_label].tolist() == pytest.approx([1 / 3, 1 / 3, 1, 1 / 2])


def test_answers_that_do_not_fit_together_have_the_prompt_in_each_row() -> None:
    answers = [answer_of(length) for length in (3, 1, 2, 6, 11)]
    rows = share_prompt(prompt_of(5), answers, 16)
    assert [each.answers for each in rows] == [slice(0, 3), slice(3, 4), slice(4, 5)]
    assert [each.sample.num_tokens for each in rows] == [13, 11, 16]
    assert not share_prompt(prompt_of(5), [], 16)


def test_an_answer_that_never_fits_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"clips.jsonl:4: a prompt of 5 tokens .* of 12 is longer"):
        share_prompt(prompt_of(5), [answer_of(12)], 16)


def test_prompts_share_rows_unless_replicas_would_be_left_without_any() -> None:
    groups = [(prompt_of(size), [learned(3), learned(2)]) for size in (5, 5, 9, 2)]

    def rows(least: int) -> list[list[int]]:
        found = answer_rows(groups, 32, pad_token_id=0, least_rows=least)
        return [np.diff(row.document_bounds).tolist() for row in found]

    # A prompt's last token is laid again for the second answer.
    assert rows(1) == [[11, 11, 10], [15, 8, 9]]
    assert rows(4) == rows(99) == [[11, 21], [11, 21], [15, 17], [8, 24]]
    (row, _) = answer_rows(groups, 32, pad_token_id=0)
    assert row.answers is not None
    assert row.answers.answers.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert row.answers.advantages.tolist() == [3, 2, 3, 2]
