# SPDX-License-Identifier: Apache-2.0
"""Lays answers behind their prompts as rows of training."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.branches import BranchedSample, pack_branches
from megatron_keye.data.row import PackedRow, RowAnswers, Sample
from megatron_keye.post_training.rows import Answer, share_prompt


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


_Piece = tuple[BranchedSample, Sequence[LearnedAnswer]]
"""A prompt with answers, as a row takes them, and what is learned from these."""


def answer_rows(
    groups: Iterable[tuple[Sample, Sequence[LearnedAnswer]]],
    row_tokens: int,
    *,
    pad_token_id: int,
    least_rows: int = 1,
) -> list[PackedRow]:
    """Return rows of prompts with the answers behind them.

    An answer sees its prompt and itself. Prompts share a row as long as they fit, in their order.
    The weights of an answer's labels are 1 / n, so that each answer weighs 1, however long it is.

    Args:
        groups: Tokens and pictures of prompts, without labels, each with answers to it, of which
            each fits into a row behind the prompt.
        row_tokens: Length of a row.
        pad_token_id: Token of padding.
        least_rows: Rows below which prompts share none, so that no replica is left without one.
    """
    pieces = [
        piece for prompt, answers in groups for piece in _pieces(prompt, answers, row_tokens)
    ]
    total = sum(sample.num_tokens for sample, _ in pieces)
    room = min(row_tokens, -(-total // least_rows))
    rows: list[list[_Piece]] = []
    left = 0
    for piece in pieces:
        num_tokens = piece[0].num_tokens
        if not rows or num_tokens > left:
            rows.append([])
            left = room
        rows[-1].append(piece)
        left -= num_tokens
    return [_row(row, row_tokens, pad_token_id) for row in rows]


def _pieces(prompt: Sample, answers: Sequence[LearnedAnswer], row_tokens: int) -> Iterator[_Piece]:
    laid = [_weighted(answer.token_ids) for answer in answers]
    for shared in share_prompt(prompt, laid, row_tokens):
        yield shared.sample, answers[shared.answers]


def _row(pieces: Sequence[_Piece], row_tokens: int, pad_token_id: int) -> PackedRow:
    row = pack_branches([sample for sample, _ in pieces], row_tokens, pad_token_id=pad_token_id)
    return replace(row, answers=_row_answers([each for _, answers in pieces for each in answers]))


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
