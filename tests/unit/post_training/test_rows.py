# SPDX-License-Identifier: Apache-2.0
"""Answers share a row with their prompt, and their tokens are its labels."""

import numpy as np
import pytest

from megatron_keye.data.row import IGNORED_LABEL, Sample, labels_of
from megatron_keye.errors import UserError
from megatron_keye.post_training.rows import Answer, shared_prompt_rows


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


def test_labels_are_the_tokens_that_count_answer_by_answer() -> None:
    answers = [answer_of(length) for length in (3, 1, 2)]
    (found,) = shared_prompt_rows(prompt_of(5), answers, 16, pad_token_id=0)
    row = found.row
    assert row.token_ids[:13].tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 4, 100, 4, 100, 101]
    is_label = row.labels != IGNORED_LABEL
    assert is_label.nonzero()[0].tolist() == [4, 6, 8, 10]
    assert row.labels[is_label].tolist() == [100, 102, 100, 100]
    assert row.weights[is_label].tolist() == pytest.approx([1 / 3, 1 / 3, 1, 1 / 2])


def test_answers_that_do_not_fit_together_have_the_prompt_in_each_row() -> None:
    answers = [answer_of(length) for length in (3, 1, 2, 6, 11)]
    rows = shared_prompt_rows(prompt_of(5), answers, 16, pad_token_id=0)
    assert [each.answers for each in rows] == [slice(0, 3), slice(3, 4), slice(4, 5)]
    assert [each.row.num_real_tokens for each in rows] == [13, 11, 16]
    assert not shared_prompt_rows(prompt_of(5), [], 16, pad_token_id=0)


def test_an_answer_that_never_fits_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"clips.jsonl:4: a prompt of 5 tokens .* of 12 is longer"):
        shared_prompt_rows(prompt_of(5), [answer_of(12)], 16, pad_token_id=0)
