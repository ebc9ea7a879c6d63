# SPDX-License-Identifier: Apache-2.0
"""Cuts prompts, and answers that run again, into pieces that run at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.rollout.pages import PageTable
from megatron_keye.rollout.sequence import Answer, Group


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens of one sequence that run at once, whose pages are there already."""

    group: Group
    """The request."""
    answer: Answer | None
    """The answer that they belong to, of which only own tokens run; None for the prompt."""
    table: PageTable
    """Where keys of the sequence are."""
    start: int
    """First token, counted from the prompt's first."""
    end: int
    """One past the last one."""
    drawn: tuple[Answer, ...]
    """Answers whose next token is drawn behind the last one."""

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The tokens."""
        prompt = self.group.request.prompt.token_ids
        own: Sequence[int] = self.answer.token_ids if self.answer is not None else ()
        return np.concatenate([prompt, np.array(own, dtype=np.int64)])[self.start : self.end]

    @property
    def pictures(self) -> list[int]:
        """Numbers of the prompt's pictures among the tokens."""
        starts = self.group.request.prompt.picture_starts
        return [n for n, start in enumerate(starts) if self.start <= start < self.end]

    def note(self) -> None:
        """Note that the tokens have run."""
        holder = self.group if self.answer is None else self.answer
        holder.num_cached = self.end


def next_pieces(group: Group, room: int, *, is_first: bool) -> Iterator[Piece]:
    """Yield what of a request runs next: of its prompt, or else of answers that run again.

    Answers begin with the last piece of the prompt, which draws their first tokens.

    Args:
        group: The request; whatever runs has its pages.
        room: Tokens that the row still takes.
        is_first: Whether the row is still empty; it then takes a picture of any size.
    """
    if group.table is not None and group.num_cached < group.num_prompt_tokens:
        end = _end_in_prompt(group, room, is_first=is_first)
        if end > group.num_cached:
            yield _prompt_piece(group, group.table, end)
        return
    for answer in group.running:
        assert answer.table is not None, "running answers have pages"
        size = min(room, answer.num_pending)
        if answer.num_pending > 1 and size > 0:
            room -= size
            yield Piece(
                group=group,
                answer=answer,
                table=answer.table,
                start=answer.num_cached,
                end=answer.num_cached + size,
                drawn=(answer,) if size == answer.num_pending else (),
            )


def _prompt_piece(group: Group, table: PageTable, end: int) -> Piece:
    draws = end == group.num_prompt_tokens and not group.answers
    if draws:
        group.answers = [_new_answer(group, n) for n in range(group.request.num_answers)]
    return Piece(
        group=group,
        answer=None,
        table=table,
        start=group.num_cached,
        end=end,
        # The others go on from where they were.
        drawn=tuple(a for a in group.answers if not a.token_ids and not a.finish) if draws else (),
    )


def _new_answer(group: Group, number: int) -> Answer:
    """Return an answer of a group, with what an earlier process drew of it."""
    begun = group.request.begun.get(number)
    if begun is None:
        return Answer(group, number)
    return Answer(
        group,
        number,
        token_ids=list(begun.token_ids),
        log_probs=list(begun.log_probs),
        versions=[begun.version] * len(begun.token_ids),
        finish=begun.finish,
    )


def _end_in_prompt(group: Group, room: int, *, is_first: bool) -> int:
    """Return where the next piece of a prompt ends: within `room` tokens, and not in a picture.

    A picture that is larger is a piece by itself.
    """
    start = group.num_cached
    end = min(start + room, group.num_prompt_tokens)
    starts = group.request.prompt.picture_starts
    for first, size in zip(starts, group.picture_sizes, strict=True):
        if first < end < first + size:
            return first + size if first == start and is_first else first
    return end
