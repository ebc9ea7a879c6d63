# SPDX-License-Identifier: Apache-2.0
"""The experts that the tokens of prompts and answers were routed to, on every rank."""

import numpy as np

from megatron_keye.data.row import NO_EXPERT
from megatron_keye.rollout.request import Experts
from megatron_keye.rollout.scheduler import ReplicaTick
from megatron_keye.rollout.sequence import Answer, Group


def num_run(tick: ReplicaTick) -> int:
    """Return how many tokens a replica runs in a tick."""
    return sum(piece.end - piece.start for piece in tick.pieces) + len(tick.decoded)


def note_routes(tick: ReplicaTick, experts: Experts) -> None:
    """Note where the tokens of a tick went, before its draws are noted.

    Tokens that run again, since their pages were taken, go by their last run, which wrote the keys
    that later tokens see.

    Args:
        tick: What ran.
        experts: Of its tokens, first those of the pieces.
    """
    first = 0
    for piece in tick.pieces:
        size = piece.end - piece.start
        _note(piece.group, piece.answer, piece.start, experts[first : first + size])
        first += size
    for answer in tick.decoded:
        _note(answer.group, answer, answer.num_cached, experts[first : first + 1])
        first += 1


def _note(group: Group, answer: Answer | None, start: int, experts: Experts) -> None:
    """Note where neighbouring tokens of a sequence went, counted from the prompt's first."""
    holder: Group | Answer = group if answer is None else answer
    if holder.experts is None:
        request = group.request
        size = len(request.prompt.token_ids) if answer is None else request.max_new_tokens
        holder.experts = np.full((size, *experts.shape[1:]), NO_EXPERT, dtype=np.uint8)
    first = start if answer is None else start - group.num_prompt_tokens
    holder.experts[first : first + len(experts)] = experts
