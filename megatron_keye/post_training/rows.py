# SPDX-License-Identifier: Apache-2.0
"""Samples of training that hold a prompt once, and behind it many answers to it.

A video's prompt is a hundred times longer than an answer, and G rows of one answer each would
train it G times. Every token sees what it sees in a row of its own, at the same positions, and has
the same label: the loss of each token and all gradients are those of G rows. What differs is
the router's balancing loss, which a row has over its own tokens: it balances the tokens that the
experts get, and these get the prompt once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.branches import Branch, BranchedSample, branch_of
from megatron_keye.data.row import Sample
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated behind a prompt."""

    token_ids: NDArray[np.int64]
    """Token ids [n], 1 or more."""
    weights: NDArray[np.float32]
    """What each token weighs in the loss [n]; 0 where it is none of the model's own."""


@dataclass(frozen=True, kw_only=True)
class SharedPrompt:
    """A prompt with some of the answers to it, to be laid into a row."""

    sample: BranchedSample
    """Behind a prompt without labels its labels are the tokens of its answers that count, answer
    by answer."""
    answers: slice
    """Which answers it holds."""


def share_prompt(prompt: Sample, answers: Sequence[Answer], row_tokens: int) -> list[SharedPrompt]:
    """Lay all answers to a prompt behind it, once or as often as rows take them in order.

    Args:
        prompt: Up to the opening of the answer; its labels, if any, count each time.
        answers: The answers, in any number.
        row_tokens: Length of a row (`data.row_tokens`).

    Raises:
        UserError: If an answer does not fit into a row with the prompt.
    """
    shared: list[SharedPrompt] = []
    first = 0
    while first < len(answers):
        stop = first
        while stop < len(answers) and _fits(prompt, answers[first : stop + 1], row_tokens):
            stop += 1
        if stop == first:
            raise UserError(
                f"{prompt.name}: a prompt of {len(prompt.token_ids)} tokens with an answer of "
                f"{len(answers[first].token_ids)} is longer than a row of {row_tokens}; set "
                "data.row_tokens to their sum at least, or rollout.max_new_tokens lower"
            )
        sample = _sample(prompt, answers[first:stop])
        shared.append(SharedPrompt(sample=sample, answers=slice(first, stop)))
        first = stop
    return shared


def _fits(prompt: Sample, answers: Sequence[Answer], row_tokens: int) -> bool:
    return _sample(prompt, answers).num_tokens <= row_tokens


def _sample(prompt: Sample, answers: Sequence[Answer]) -> BranchedSample:
    behind = [
        Branch(token_ids=each.token_ids, token_weights=each.weights, parent=0) for each in answers
    ]
    return BranchedSample(name=prompt.name, branches=(branch_of(prompt), *behind))
