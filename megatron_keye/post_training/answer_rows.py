"""Lays answers behind their prompts as rows of training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import batched

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.packing import pack
from megatron_keye.data.row import PackedRow, RowAnswers, Sample, labels_of


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
    """Return rows in which each answer stands behind a prompt of its own.

    The weights of an answer's labels are 1 / n, so that each answer weighs 1, however long it is.

    Args:
        prompt: Tokens and pictures, without labels.
        answers: Answers to it, each of which fits into a row behind the prompt.
        row_tokens: Length of a row.
        pad_token_id: Token of padding.
    """
    longest = len(prompt.token_ids) + max(len(answer.token_ids) for answer in answers)
    return [
        _row(prompt, together, row_tokens, pad_token_id)
        for together in batched(answers, row_tokens // longest)
    ]


def _row(
    prompt: Sample, answers: Sequence[LearnedAnswer], row_tokens: int, pad_token_id: int
) -> PackedRow:
    samples = [_answered(prompt, answer.token_ids) for answer in answers]
    row = pack(samples, row_tokens, pad_token_id=pad_token_id)
    lengths = [len(answer.token_ids) for answer in answers]
    places = [answer.first_place + np.arange(len(answer.token_ids)) for answer in answers]
    return replace(
        row,
        answers=RowAnswers(
            answers=np.repeat(np.arange(len(answers)), lengths),
            places=np.concatenate(places),
            old_log_probs=np.concatenate([answer.old_log_probs for answer in answers]),
            advantages=np.array([answer.advantage for answer in answers]),
        ),
    )


def _answered(prompt: Sample, answer: Sequence[int]) -> Sample:
    """Return the prompt with an answer, whose tokens are the labels."""
    token_ids = np.concatenate([prompt.token_ids, np.array(answer, dtype=np.int64)])
    weights = np.zeros(len(token_ids), dtype=np.float32)
    weights[len(prompt.token_ids) - 1 : -1] = 1 / len(answer)
    labels = labels_of(token_ids, weights)
    return replace(prompt, token_ids=token_ids, labels=labels, weights=weights)
