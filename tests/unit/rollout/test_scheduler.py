# SPDX-License-Identifier: Apache-2.0
"""Every request is answered as if it were alone, whatever the limits, and no page is lost.

The model is replaced by a rule that gives the next token from all tokens before it, and the cache
by an array of the tokens that were written.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.config import RolloutConfig
from megatron_keye.errors import UserError
from megatron_keye.rollout.request import Completion, Request
from megatron_keye.rollout.scheduler import ReplicaScheduler, ReplicaTick
from tests.support.rollout import prompt, request

PLACEHOLDERS = (90, 91)


def next_token(tokens: Sequence[int], answer: int) -> int:
    """Return the token that follows: mostly text, at times a placeholder or a stop."""
    return int((sum(tokens) * 31 + len(tokens) * 7 + answer * 13) % 95)


def expected(asked: Request, answer: int) -> tuple[list[int], str]:
    """Answer without any schedule."""
    tokens, prompt_length = asked.prompt.token_ids.tolist(), len(asked.prompt.token_ids)
    while True:
        token = next_token(tokens, answer)
        if token in PLACEHOLDERS:
            return tokens[prompt_length:], "aborted"
        tokens.append(token)
        if token in asked.stop_ids:
            return tokens[prompt_length:], "stop"
        if len(tokens) - prompt_length == asked.max_new_tokens:
            return tokens[prompt_length:], "length"


class FakeReplica:
    """Runs ticks on an array that stands for the keys: each slot holds the token written there."""

    def __init__(self, rollout: RolloutConfig, num_pages: int) -> None:
        self.rollout = rollout
        self.scheduler = ReplicaScheduler(rollout, num_pages, 2, PLACEHOLDERS)
        self.memory = np.full(num_pages * rollout.page_tokens, -1)

    def run(self, tick: ReplicaTick) -> list[tuple[int, float]]:
        page = self.rollout.page_tokens
        pages = self.memory.reshape(-1, page)
        pages[list(tick.copies)] = pages[list(tick.copies.values())]
        drawn = []
        for piece in tick.pieces:
            self.memory[piece.table.slots(piece.start, piece.end)] = piece.token_ids
            drawn += [(answer, piece.table, piece.end) for answer in piece.drawn]
        for answer in tick.decoded:
            assert answer.table is not None
            end = answer.num_cached + 1
            self.memory[answer.table.slots(end - 1, end)] = answer.token_ids[-1]
            drawn.append((answer, answer.table, end))
        seen = [(a, self.memory[table.slots(0, end)].tolist()) for a, table, end in drawn]
        return [(next_token(tokens, answer.number), 0.0) for answer, tokens in seen]

    def answer(self, requests: list[Request], drops_at: int = -1) -> list[Completion]:
        waiting, found = list(requests), []
        for number in range(5000):
            while waiting and self.scheduler.wants_request:
                self.scheduler.add(waiting.pop(0))
            if self.scheduler.is_idle:
                return found
            if number == drops_at:
                self.scheduler.drop_caches()
                self.memory[:] = -1
                assert self.scheduler.num_used_pages == 0
            tick = self.scheduler.plan()
            self.check(tick)
            found += self.scheduler.note(tick, self.run(tick), version=int(number >= drops_at))
        raise AssertionError("requests were not answered")

    def check(self, tick: ReplicaTick) -> None:
        assert tick.pieces or tick.decoded, "every tick runs something"
        assert len(tick.decoded) <= self.rollout.max_sequences
        sizes = [piece.end - piece.start for piece in tick.pieces]
        assert len(sizes) == 1 or sum(sizes) <= self.rollout.prefill_tokens
        for piece in tick.pieces:
            starts = piece.group.request.prompt.picture_starts
            for start, size in zip(starts, piece.group.picture_sizes, strict=True):
                is_cut = start < piece.start < start + size or start < piece.end < start + size
                assert not is_cut, "no picture is cut"


@st.composite
def requests_and_limits(draw: st.DrawFn) -> tuple[list[Request], RolloutConfig, int]:
    requests = [
        request(
            key,
            prompt(key, draw(st.integers(1, 25)), *draw(st.sampled_from(PICTURES))),
            num_answers=draw(st.integers(1, 4)),
            max_new_tokens=draw(st.integers(1, 12)),
            stop_ids=(1, 2),
        )
        for key in range(draw(st.integers(1, 5)))
    ]
    rollout = RolloutConfig(
        page_tokens=draw(st.sampled_from([1, 3, 8])),
        prefill_tokens=draw(st.sampled_from([1, 5, 30, 200])),
        max_sequences=draw(st.sampled_from([1, 2, 16])),
    )
    page = rollout.page_tokens
    lengths = [(len(r.prompt.token_ids), r.max_new_tokens) for r in requests]
    smallest = max(-(-p // page) - p // page + -(-(p + n) // page) for p, n in lengths)
    return requests, rollout, smallest + draw(st.sampled_from([0, 1, 5, 400]))


PICTURES: list[tuple[tuple[int, int], ...]] = [(), ((2, 2),), ((4, 6), (2, 4))]


@settings(max_examples=400)
@given(requests_and_limits(), st.integers(-1, 12))
def test_answers_do_not_depend_on_the_limits(
    given_: tuple[list[Request], RolloutConfig, int], drops_at: int
) -> None:
    requests, rollout, num_pages = given_
    replica = FakeReplica(rollout, num_pages)
    found = {(c.key, c.answer): c for c in replica.answer(requests, drops_at)}
    assert len(found) == sum(each.num_answers for each in requests)
    for (key, number), completion in found.items():
        tokens, finish = expected(requests[key], number)
        assert list(completion.token_ids) == tokens
        assert completion.finish == finish
        assert sum(count for _, count in completion.versions) == len(tokens)
    assert replica.scheduler.num_used_pages == 0


def test_answers_to_one_prompt_share_its_pages() -> None:
    scheduler = ReplicaScheduler(RolloutConfig(page_tokens=4), 40, 2, PLACEHOLDERS)
    scheduler.add(request(0, prompt(3, 33), num_answers=8, max_new_tokens=2))
    first = scheduler.plan()
    assert len(first.drawn) == 8 and scheduler.num_used_pages == 9
    scheduler.note(first, [(0, 0.0)] * 8, 0)
    assert len(scheduler.plan().decoded) == 8
    # Eight whole pages are shared; the ninth is copied for all answers but the last.
    assert scheduler.num_used_pages == 8 + 8


def test_a_prompt_that_the_cache_cannot_hold_is_refused_with_a_sentence() -> None:
    scheduler = ReplicaScheduler(RolloutConfig(page_tokens=4), 10, 2, PLACEHOLDERS)
    scheduler.add(request(0, prompt(1, 32), max_new_tokens=8))
    with pytest.raises(UserError, match="prompt 1: has 32 tokens.*rollout.cache_tokens"):
        scheduler.add(request(1, prompt(1, 32), max_new_tokens=9))
