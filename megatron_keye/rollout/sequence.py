# SPDX-License-Identifier: Apache-2.0
"""A request that is being answered: its prompt, its answers, and what of them is in the cache."""

from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.row import NO_EXPERT
from megatron_keye.decoder.positions import position_ids
from megatron_keye.rollout.pages import PageTable
from megatron_keye.rollout.request import AnswerRoutes, Completion, Experts, Finish, Request


@dataclass(eq=False)
class Answer:
    """One answer of a group."""

    group: "Group"
    """Its request."""
    number: int
    """Number within the group."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens so far; the newest is not in the cache yet."""
    log_probs: list[float] = field(default_factory=list)
    """Of each token."""
    versions: list[int] = field(default_factory=list)
    """Weights that drew each token."""
    finish: Finish | None = None
    """Why it ended; None while it goes on."""
    table: PageTable | None = None
    """Pages, those of the prompt first; None while it waits for some."""
    num_cached: int = 0
    """Tokens of prompt and answer whose keys are in the cache."""
    experts: Experts | None = None
    """Where its tokens went, if that is noted, with room for all that it may have."""

    @property
    def num_pending(self) -> int:
        """Tokens of prompt and answer that have to run before the next one is drawn."""
        return self.group.num_prompt_tokens + len(self.token_ids) - self.num_cached

    def drop(self) -> None:
        """Give its pages back; its tokens run again later."""
        if self.table is not None:
            self.table.release()
        self.table, self.num_cached = None, 0

    def completion(self) -> Completion:
        """Return it as the caller gets it."""
        assert self.finish is not None, "only finished answers are handed out"
        runs = [(version, len(list(run))) for version, run in groupby(self.versions)]
        return Completion(
            key=self.group.request.key,
            answer=self.number,
            token_ids=tuple(self.token_ids),
            log_probs=tuple(self.log_probs),
            finish=self.finish,
            versions=tuple(runs),
            routes=self._routes(),
        )

    def _routes(self) -> AnswerRoutes | None:
        of_prompt, count = self.group.experts, len(self.token_ids)
        if of_prompt is None:
            return None
        if self.experts is None:  # It has ended with its first token.
            nothing = np.full((count, *of_prompt.shape[1:]), NO_EXPERT, dtype=np.uint8)
            return AnswerRoutes(of_prompt, nothing)
        return AnswerRoutes(of_prompt, self.experts[:count].copy())


class Group:
    """The answers to one request, which share its prompt's pages."""

    def __init__(self, request: Request, merge_size: int) -> None:
        """Start without pages or answers.

        Args:
            request: The request.
            merge_size: Patches along each side of the square that becomes one token.
        """
        self.request = request
        self.num_prompt_tokens = len(request.prompt.token_ids)
        self.answers: list[Answer] = []
        """All answers, from when the prompt has run first."""
        self.table: PageTable | None = None
        """Pages of the prompt, as long as an answer may still have to share them."""
        self.num_cached = 0
        """Tokens of the prompt whose keys are in the pages of `table`."""
        self.experts: Experts | None = None
        """Where the prompt's tokens went, if that is noted."""
        prompt = request.prompt
        self.picture_sizes = [picture.num_tokens(merge_size) for picture in prompt.pictures]
        """Tokens of each picture."""
        shapes = [
            (picture.patch_grid[0] // merge_size, picture.patch_grid[1] // merge_size)
            for picture in prompt.pictures
        ]
        bounds = np.array([0, self.num_prompt_tokens + 1])
        self._prompt_positions = position_ids(bounds, prompt.picture_starts, shapes)

    @property
    def waiting(self) -> list[Answer]:
        """Answers that have no pages and go on."""
        return [a for a in self.answers if a.table is None and a.finish is None]

    @property
    def running(self) -> list[Answer]:
        """Answers that have pages."""
        return [answer for answer in self.answers if answer.table is not None]

    @property
    def has_ended(self) -> bool:
        """Whether all answers have ended."""
        return bool(self.answers) and all(answer.finish for answer in self.answers)

    @property
    def source(self) -> PageTable | None:
        """A table that has the whole prompt in the cache, None without one."""
        if self.table is not None and self.num_cached == self.num_prompt_tokens:
            return self.table
        return next((answer.table for answer in self.running), None)

    def drop_prompt(self) -> None:
        """Give the prompt's own pages back."""
        if self.table is not None:
            self.table.release()
        self.table, self.num_cached = None, 0

    def positions(self, start: int, end: int) -> NDArray[np.int64]:
        """Return time, height and width position [3, end - start] of tokens of an answer.

        Args:
            start: First token, counted from the prompt's first.
            end: One past the last one.
        """
        length = self.num_prompt_tokens
        inside = self._prompt_positions[:, start : min(end, length)]
        behind = np.arange(max(start, length), max(end, length)) - length
        text = self._prompt_positions[0, length] + behind
        return np.concatenate([inside, np.broadcast_to(text, (3, len(text)))], axis=1)
