# SPDX-License-Identifier: Apache-2.0
"""Decides which tokens run next on one replica: admission by pages, prefill in parts, preemption.

It depends on requests and drawn tokens alone. Every rank runs it for all replicas and so knows,
without a message, what all others do next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_keye.config.rollout import RolloutConfig
from megatron_keye.errors import UserError
from megatron_keye.rollout.pages import PagePool, PageTable
from megatron_keye.rollout.pieces import Piece, next_pieces
from megatron_keye.rollout.request import Completion, Request
from megatron_keye.rollout.sequence import Answer, Group


@dataclass(frozen=True)
class ReplicaTick:
    """What one replica runs next."""

    copies: dict[int, int] = field(default_factory=dict)
    """Pages to copy before anything is written: source by destination. A source is none that is
    written here."""
    pieces: list[Piece] = field(default_factory=list)
    """Tokens of prompts, and of answers that run again."""
    decoded: list[Answer] = field(default_factory=list)
    """Answers whose newest token runs."""

    @property
    def drawn(self) -> list[Answer]:
        """The answers that get a token, first those of the pieces."""
        return [a for piece in self.pieces for a in piece.drawn] + self.decoded


class ReplicaScheduler:
    """The requests of one replica, in the order of their arrival.

    Nobody overtakes: who came first is started first and preempted last, so the first request
    always goes on.
    """

    def __init__(
        self, rollout: RolloutConfig, num_pages: int, merge_size: int, placeholders: Sequence[int]
    ) -> None:
        """Start without requests.

        Args:
            rollout: Limits and the size of a page.
            num_pages: Pages of the cache.
            merge_size: Patches along each side of the square that becomes one token.
            placeholders: Tokens that stand for pictures and end an answer.
        """
        self._rollout, self._merge_size = rollout, merge_size
        self._placeholders = frozenset(placeholders)
        self._pool = PagePool(num_pages)
        self._groups: list[Group] = []

    @property
    def wants_request(self) -> bool:
        """Whether more requests could begin in the next tick."""
        waiting = [g.num_prompt_tokens for g in self._groups if g.table is None and not g.answers]
        rollout = self._rollout
        return len(waiting) < rollout.max_sequences and sum(waiting) < rollout.prefill_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts here; the replica with the fewest gets the next request."""
        return sum(group.num_prompt_tokens for group in self._groups)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to answer."""
        return not self._groups

    @property
    def num_used_pages(self) -> int:
        """Pages that are held."""
        return self._pool.num_pages - self._pool.num_free

    def add(self, request: Request) -> None:
        """Take a request.

        Raises:
            UserError: When the cache could not hold a single answer to it.
        """
        self._check_fits(request)
        self._groups.append(Group(request, self._merge_size))

    def plan(self) -> ReplicaTick:
        """Decide what runs next, and give it pages."""
        tick = ReplicaTick()
        self._start_answers(tick)
        self._plan_decode(tick)
        self._plan_pieces(tick)
        return tick

    def note(
        self, tick: ReplicaTick, tokens: Sequence[tuple[int, float]], version: int
    ) -> list[Completion]:
        """Take the tokens that were drawn, and return the answers that end with them.

        Args:
            tick: What ran.
            tokens: Token and log-probability for each of `tick.drawn`.
            version: Of the weights.
        """
        for piece in tick.pieces:
            piece.note()
        for answer in tick.decoded:
            answer.num_cached += 1
        completions = []
        for answer, (token, log_prob) in zip(tick.drawn, tokens, strict=True):
            self._append(answer, token, log_prob, version)
            if answer.finish is not None:
                answer.drop()
                completions.append(answer.completion())
        for group in [group for group in self._groups if group.has_ended]:
            group.drop_prompt()
            self._groups.remove(group)
        return completions

    def drop_caches(self) -> None:
        """Give all pages back; whatever goes on runs again from its first token."""
        for group in self._groups:
            group.drop_prompt()
            for answer in group.running:
                answer.drop()

    def _append(self, answer: Answer, token: int, log_prob: float, version: int) -> None:
        if token in self._placeholders:
            answer.finish = "aborted"
            return
        answer.token_ids.append(token)
        answer.log_probs.append(log_prob)
        answer.versions.append(version)
        if token in answer.group.request.stop_ids:
            answer.finish = "stop"
        elif len(answer.token_ids) == answer.group.request.max_new_tokens:
            answer.finish = "length"

    def _check_fits(self, request: Request) -> None:
        """Raise unless one answer fits beside the prompt, which others may wait to share."""
        page, length = self._rollout.page_tokens, len(request.prompt.token_ids)
        of_prompt = -(-length // page)
        of_answer = -(-(length + request.max_new_tokens) // page) - length // page
        if of_prompt + of_answer > self._pool.num_pages:
            raise UserError(
                f"{request.prompt.name}: has {length} tokens, which with {request.max_new_tokens} "
                f"of an answer take {of_prompt + of_answer} pages, expected at most the "
                f"{self._pool.num_pages} of the cache; raise rollout.cache_tokens, or lower "
                "rollout.max_new_tokens"
            )

    def _start_answers(self, tick: ReplicaTick) -> None:
        """Give pages to answers whose prompt is in the cache."""
        for group in self._groups:
            for answer in group.waiting:
                if group.source is None or not self._start(answer, group.source, tick):
                    return
            if group.answers:
                group.drop_prompt()

    def _start(self, answer: Answer, source: PageTable, tick: ReplicaTick) -> bool:
        if self._num_running() == self._rollout.max_sequences:
            return False
        length = answer.group.num_prompt_tokens
        table = source.fork(length)
        # A single token gets its place when it runs.
        num_again = len(answer.token_ids) if len(answer.token_ids) > 1 else 0
        if not self._has_room(table.num_wanted(max(1, num_again)), answer.group):
            table.release()
            return False
        tick.copies.update(table.grow(num_again))
        answer.table, answer.num_cached = table, length
        return True

    def _plan_decode(self, tick: ReplicaTick) -> None:
        """Give each running answer a place for its newest token, at the cost of younger ones."""
        for answer in [answer for group in self._groups for answer in group.running]:
            table = answer.table
            if table is None or answer.num_pending > 1:
                continue
            # It has a place already if it runs again and only its newest token is left to run.
            num_new = answer.num_cached + 1 - table.num_tokens
            while answer.table is table and self._pool.num_free < table.num_wanted(num_new):
                self._preempt()
            if answer.table is table:
                tick.copies.update(table.grow(num_new))
                tick.decoded.append(answer)

    def _plan_pieces(self, tick: ReplicaTick) -> None:
        """Fill a row with tokens of prompts and of answers that run again."""
        room = self._rollout.prefill_tokens
        for group in self._groups:
            if not self._admit(group):
                return
            pieces = list(next_pieces(group, room, is_first=not tick.pieces))
            tick.pieces.extend(pieces)
            room -= sum(piece.end - piece.start for piece in pieces)
            if room <= 0:
                return

    def _admit(self, group: Group) -> bool:
        """Give a prompt pages if it has to run; False if there are none."""
        if group.table is not None or group.source is not None:
            return True
        table = PageTable(self._pool, self._rollout.page_tokens)
        length = group.num_prompt_tokens
        if self._num_running() == self._rollout.max_sequences:
            return False
        if not self._has_room(table.num_wanted(length) + 1, group):
            return False
        table.grow(length)
        group.table = table
        return True

    def _num_running(self) -> int:
        return sum(len(group.running) for group in self._groups)

    def _has_room(self, wanted: int, group: Group) -> bool:
        """Return whether there are free pages, taken from younger requests if nobody else runs.

        Answers that run will want a page each soon; without these to spare, they would take the
        pages back at once.
        """
        before = self._groups[: self._groups.index(group) + 1]
        num_running = sum(len(each.running) for each in before)
        while self._pool.num_free < wanted + num_running:
            if num_running or not self._preempt(behind=group):
                return False
        return True

    def _preempt(self, behind: Group | None = None) -> bool:
        """Take the pages of the answer or prompt that came last; False if there is none.

        Args:
            behind: Spare this request and those before it; None spares nobody.
        """
        first = self._groups.index(behind) + 1 if behind is not None else 0
        for group in reversed(self._groups[first:]):
            if group.running:
                group.running[-1].drop()
                return True
            if group.table is not None:
                group.drop_prompt()
                return True
        return False
