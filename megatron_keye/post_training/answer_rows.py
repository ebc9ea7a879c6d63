# SPDX-License-Identifier: Apache-2.0
"""Lays answers behind their prompts as rows of training."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.branches import BranchedSample, pack_branches
from megatron_keye.data.row import NO_EXPERT, PackedRow, RowAnswers, Sample
from megatron_keye.post_training.rows import Answer, share_prompt
from megatron_keye.rollout.request import AnswerRoutes


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
    routes: AnswerRoutes | None = None
    """The experts to which generation routed its tokens and the prompt's, if they are replayed."""


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
    return replace(
        row,
        answers=_row_answers([each for _, answers in pieces for each in answers]),
        routes=_row_routes(pieces, row_tokens),
    )


def _row_routes(pieces: Sequence[_Piece], row_tokens: int) -> NDArray[np.uint8] | None:
    """Return where the tokens of a row went, laid as these are; None where no answer says that."""
    known = [routes for _, answers in pieces if (routes := _prompt_routes(answers)) is not None]
    if not known:
        return None
    unknown = np.full((row_tokens, *known[0].shape[1:]), NO_EXPERT, dtype=np.uint8)
    parts = [part for piece in pieces for part in _piece_routes(piece, unknown)]
    return np.concatenate([*parts, unknown[sum(map(len, parts)) :]])


def _piece_routes(piece: _Piece, unknown: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    sample, answers = piece
    of_prompt = _prompt_routes(answers)
    if of_prompt is None:
        return [unknown[: sample.num_tokens]]
    # Before several answers, the prompt's last token stands at the start of each of them.
    num_once = len(of_prompt) - (len(answers) > 1)
    parts = [of_prompt[:num_once]]
    for answer in answers:
        own = unknown[: len(answer.token_ids)] if answer.routes is None else answer.routes.answer
        parts += [of_prompt[num_once:], own]
    return parts


def _prompt_routes(answers: Sequence[LearnedAnswer]) -> NDArray[np.uint8] | None:
    return next((each.routes.prompt for each in answers if each.routes is not None), None)


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
