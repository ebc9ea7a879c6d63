# SPDX-License-Identifier: Apache-2.0
"""Lays answers behind their prompts as rows of training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.row import PackedRow, RowAnswers, Sample
from megatron_keye.post_training.rows import Answer, shared_prompt_rows


@dataclass(frozen=True, kw_only=True)
class LearnedAnswer:
    """An answer as a step learns from it."""

    token_ids: tuple[int, ...]
    """Its tokens, 1 or more."""
    first_place: int
    """Place of the first one among the tokens of all answers of the step."""
    old_log_probs: NDArray[np.float64]
    """Log-probability of each token before the step's first update [n]."""
    advantage: float
    """How much better than its group's mean it is."""


def answer_rows(
    prompt: Sample, answers: Sequence[LearnedAnswer], row_tokens: int, *, pad_token_id: int
) -> list[PackedRow]:
    """Return rows of a prompt and the answers behind it, each of which sees the prompt and itself.

    The weights of an answer's labels are 1 / n, so that each answer weighs 1, however long it is.

    Args:
        prompt: Tokens and pictures, without labels.
        answers: Answers to it, each of which fits into a row behind the prompt.
        row_tokens: Length of a row.
        pad_token_id: Token of padding.
    """
    laid = [_weighted(answer.token_ids) for answer in answers]
    shared = shared_prompt_rows(prompt, laid, row_tokens, pad_token_id=pad_token_id)
    return [replace(each.row, answers=_row_answers(answers[each.answers])) for each in shared]


def _row_answers(answers: Sequence[LearnedAnswer]) -> RowAnswers:
    """Return what is known of a row's labels, which are the answers' tokens in order."""
    lengths = [len(answer.token_ids) for answer in answers]
    places = [answer.first_place + np.arange(len(answer.token_ids)) for answer in answers]
    return RowAnswers(
        answers=np.repeat(np.arange(len(answers)), lengths),
        places=np.concatenate(places),
        old_log_probs=np.concatenate([answer.old_log_probs for answer in answers]),
        advantages=np.array([answer.advantage for answer in answers]),
    )


def _weighted(token_ids: Sequence[int]) -> Answer:
    weights = np.full(len(token_ids), 1 / len(token_ids), dtype=np.float32)
    return Answer(token_ids=np.array(token_ids, dtype=np.int64), weights=weights)
