# SPDX-License-Identifier: Apache-2.0
"""Ticks over tensors that stay are those of new tensors, and few shapes are captured."""

import torch
from torch import Tensor

from megatron_keye.rollout.cache import allocate
from megatron_keye.rollout.new_tokens import NewTokens, RankCache, tokens_of_answers
from megatron_keye.rollout.pages import PagePool, PageTable
from megatron_keye.rollout.replayed import ReplayedTicks
from megatron_keye.rollout.sequence import Answer, Group
from tests.support.rollout import prompt, request
from tests.support.tiny import tiny_run

CPU = torch.device("cpu")


def tick(tokens: NewTokens) -> Tensor:
    """Return a row for each answer that depends on everything that a tick reads."""
    batch, cache = tokens.batch, tokens.cache
    assert cache.pages_BN is not None and cache.lengths_B is not None
    sums = cache.pages_BN.sum(dim=1) + 10 * cache.lengths_B + 100 * cache.slots_T
    sums = sums + 1_000 * batch.token_ids_BS[0] + 7 * batch.position_ids_3T.sum(dim=0)
    sums = sums + 3 * batch.key_end_T - batch.key_start_T + batch.is_real_T
    return sums.double()[:, None][batch.label_positions_L]


def test_replayed_ticks_are_those_of_new_tensors() -> None:
    run = tiny_run()
    pool = PagePool(200)
    rank = RankCache(
        layers=allocate(run, 200, CPU),
        page_tokens=4,
        tensor_rank=0,
        num_tensor_ranks=1,
        device=CPU,
    )
    answers = []
    for key in range(9):
        answer = Answer(Group(request(key, prompt(key, 5 + key)), 2), 0)
        answer.table, answer.token_ids = PageTable(pool, 4), [key]
        answer.num_cached = 5 + key
        answer.table.grow(6 + key)
        answers.append(answer)
    replayed, places = ReplayedTicks(CPU), set()
    for asked in [answers[:n] for n in range(10)] + [answers[3:5], answers[4:9], answers[:1]]:
        plain = tick(tokens_of_answers(asked, rank, gathers_keys=False))
        tokens = tokens_of_answers(asked, rank, gathers_keys=False, rounds_up=True)
        logits = replayed(tick, tokens)
        places.add(logits.data_ptr())
        # Rows of padding have pages of their own, -1, as many as the table is wide.
        width = tokens.cache.pages_BN.shape[1]
        narrow = max([1, *(len(each.table.pages) for each in asked)])
        assert torch.equal(logits[: len(asked)] + (width - narrow), plain[: len(asked)])
    assert replayed.num_captured == len(places) <= 10, "powers of two of answers and of pages"
    replayed.forget()
    assert replayed.num_captured == 0
