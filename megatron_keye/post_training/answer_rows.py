# SPDX-License-Identifier: Apache-2.0
"""Lays answers behind their prompts as rows of training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.row import NO_EXPERT, PackedRow, RowAnswers, Sample
from megatron_keye.post_training.rows import Answer, shared_prompt_rows
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
    return [
        replace(
            each.row,
            answers=_row_answers(answers[each.answers]),
            routes=_row_routes(prompt, answers[each.answers], row_tokens),
        )
        for each in shared
    ]


def _row_routes(
    prompt: Sample, answers: Sequence[LearnedAnswer], row_tokens: int
) -> NDArray[np.uint8] | None:
    """Return where the tokens of a row went, laid as these are; None where no answer says that.

    Args:
        prompt: The prompt.
        answers: The answers behind it.
        row_tokens: Length of the row.
    """
    known = [answer.routes for answer in answers if answer.routes is not None]
    if not known:
        return None
    of_prompt = known[0].prompt
    unknown = np.full((row_tokens, *of_prompt.shape[1:]), NO_EXPERT, dtype=np.uint8)
    # Before several answers, the prompt's last token stands at the start of each of them.
    repeated = 1 if len(answers) > 1 else 0
    parts = [of_prompt[: len(prompt.token_ids) - repeated]]
    for answer in answers:
        own = unknown[: len(answer.token_ids)] if answer.routes is None else answer.routes.answer
        parts += [of_prompt[len(of_prompt) - repeated :], own]
    num_laid = sum(map(len, parts))
    return np.concatenate([*parts, unknown[num_laid:]])


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
