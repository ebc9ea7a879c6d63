"""Answers share a row with their prompt, and are found again in it."""

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
    weights = np.ones(length, dtype=np.float32)
    weights[1:2] = 0
    return Answer(
        token_ids=100 + np.arange(length),
        weights=weights,
        old_log_probs=-np.arange(length, dtype=np.float32) - 1,
    )


def test_each_position_knows_whose_token_it_predicts() -> None:
    answers = [answer_of(length) for length in (3, 1, 2)]
    (found,) = shared_prompt_rows(prompt_of(5), answers, row_tokens=16, pad_token_id=0)
    row = found.row
    assert row.token_ids[:13].tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 4, 100, 4, 100, 101]
    assert found.answer_of_T.tolist() == [-1] * 4 + [0, -1, 0, -1, 1, -1, 2] + [-1] * 5
    assert (row.labels != IGNORED_LABEL).tolist() == (found.answer_of_T >= 0).tolist()
    assert found.old_log_probs_T[[4, 5, 6]].tolist() == [-1, 0, -3]
    assert [each.tolist() for each in found.split_log_probs(np.arange(16.0))] == [
        [4, 5, 6],
        [8],
        [10, 11],
    ]


def test_answers_that_do_not_fit_together_have_the_prompt_in_each_row() -> None:
    answers = [answer_of(length) for length in (3, 1, 2, 6, 11)]
    rows = shared_prompt_rows(prompt_of(5), answers, row_tokens=16, pad_token_id=0)
    assert [each.answers for each in rows] == [(0, 1, 2), (3,), (4,)]
    assert [each.row.num_real_tokens for each in rows] == [13, 11, 16]
    assert set(rows[1].answer_of_T.tolist()) == {-1, 3}
    assert not shared_prompt_rows(prompt_of(5), [], row_tokens=16, pad_token_id=0)


def test_an_answer_that_never_fits_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"clips.jsonl:4: a prompt of 5 tokens .* of 12 is longer"):
        shared_prompt_rows(prompt_of(5), [answer_of(12)], row_tokens=16, pad_token_id=0)
