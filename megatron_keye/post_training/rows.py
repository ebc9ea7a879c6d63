"""Rows of training that hold a prompt once, and behind it many answers to it.

A video's prompt is a hundred times longer than an answer, and G rows of one answer each would
train it G times. Every token sees what it sees in a row of its own, at the same positions, and has
the same label: the loss of each token and all gradients are those of G rows. What differs is in
the router's balancing loss, which a row has over its own tokens: it balances the tokens that the
experts get, and these get the prompt once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.branches import Branch, BranchedSample, branch_of, pack_branches
from megatron_keye.data.row import PackedRow, Sample
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated behind a prompt."""

    token_ids: NDArray[np.int64]
    """Token ids [T], at least one."""
    weights: NDArray[np.float32]
    """What each token weighs in the loss [T]; 0 where it is none of the model's own."""
    old_log_probs: NDArray[np.float32]
    """Log-probability of each token when it was drawn [T]."""


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """A row of training, and whose tokens its positions predict; T is the row's length."""

    row: PackedRow
    """The row as training runs it."""
    answers: tuple[int, ...]
    """Which of the answers it holds."""
    answer_of_T: NDArray[np.int64]
    """For each position the answer, 0 to the number of all answers, of which it predicts a token
    that counts; -1 where it predicts none."""
    old_log_probs_T: NDArray[np.float32]
    """For each position the old log-probability of the token that it predicts; 0 where none."""
    predicting: tuple[NDArray[np.int64], ...]
    """For each of `answers` the row position that predicts each of its tokens."""

    def split_log_probs(self, log_probs_T: NDArray[np.floating]) -> list[NDArray[np.floating]]:
        """Return what holds for the tokens of each of `answers` of what holds for positions.

        Args:
            log_probs_T: For each position something about the token that it predicts [T], such as
                its log-probability: the negative loss of the label there.
        """
        return [log_probs_T[positions] for positions in self.predicting]


def shared_prompt_rows(
    prompt: Sample, answers: Sequence[Answer], *, row_tokens: int, pad_token_id: int
) -> list[AnswerRow]:
    """Lay a prompt with the answers to it into as few rows as take them in order.

    Args:
        prompt: Up to the opening of the answer; its labels, if any, count once in each row.
        answers: The answers, in any number.
        row_tokens: Length of a row (`data.row_tokens`).
        pad_token_id: Token of the padding.

    Raises:
        UserError: If an answer does not fit into a row with the prompt.
    """
    rows: list[AnswerRow] = []
    taken: list[int] = []
    for index, answer in enumerate(answers):
        if _sample(prompt, [answer]).num_tokens > row_tokens:
            raise UserError(
                f"{prompt.name}: a prompt of {len(prompt.token_ids)} tokens with an answer of "
                f"{len(answer.token_ids)} is longer than a row of {row_tokens}; set "
                "data.row_tokens to their sum at least, or rollout.max_new_tokens lower"
            )
        together = [answers[each] for each in [*taken, index]]
        if _sample(prompt, together).num_tokens > row_tokens:
            rows.append(_row(prompt, answers, taken, row_tokens, pad_token_id))
            taken = []
        taken.append(index)
    if taken:
        rows.append(_row(prompt, answers, taken, row_tokens, pad_token_id))
    return rows


def _sample(prompt: Sample, answers: Sequence[Answer]) -> BranchedSample:
    behind = [
        Branch(token_ids=each.token_ids, token_weights=each.weights, parent=0) for each in answers
    ]
    return BranchedSample(name=prompt.name, branches=(branch_of(prompt), *behind))


def _row(
    prompt: Sample, answers: Sequence[Answer], taken: list[int], row_tokens: int, pad: int
) -> AnswerRow:
    """Return the row of the answers that were taken."""
    sample = _sample(prompt, [answers[index] for index in taken])
    row, [[_, *predicting]] = pack_branches([sample], row_tokens, pad_token_id=pad)
    answer_of_T = np.full(row_tokens, -1, dtype=np.int64)
    old_log_probs_T = np.zeros(row_tokens, dtype=np.float32)
    for index, positions in zip(taken, predicting, strict=True):
        counts = answers[index].weights > 0
        answer_of_T[positions[counts]] = index
        old_log_probs_T[positions[counts]] = answers[index].old_log_probs[counts]
    return AnswerRow(
        row=row,
        answers=tuple(taken),
        answer_of_T=answer_of_T,
        old_log_probs_T=old_log_probs_T,
        predicting=tuple(predicting),
    )
