# SPDX-License-Identifier: Apache-2.0
"""Rows and chunks are balanced, and none is lost or split."""

import numpy as np
import pytest

from megatron_keye.plan.balance import (
    RowCost,
    cut_frames,
    lpt_assign,
    order_rows,
)
from megatron_keye.plan.cost import VisionCost, attention_flops
from tests.support.tiny import tiny_model

COST = VisionCost(500)


def random_costs(count: int, seed: int = 0) -> list[RowCost]:
    generator = np.random.default_rng(seed)
    return [RowCost(*generator.pareto(1.5, 2).tolist()) for _ in range(count)]


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_every_row_is_assigned_once(replicas: int) -> None:
    costs = random_costs(24)
    for ends in (True, False):
        order = order_rows(costs, replicas, few_pictures_at_ends=ends)
        assert sorted(order) == list(range(24))


def test_replicas_wait_less_for_each_other_than_in_loading_order() -> None:
    costs = random_costs(64)

    def slowest(order: list[int]) -> float:
        """Sum the most expensive row of each micro-batch, which all replicas wait for."""
        groups = np.array([costs[row].attention for row in order]).reshape(-1, 8)
        return float(groups.max(axis=1).sum())

    order = order_rows(costs, 8, few_pictures_at_ends=True)
    assert slowest(order) < 0.75 * slowest(list(range(64)))
    totals = np.array([costs[row].attention for row in order]).reshape(-1, 8).sum(axis=0)
    assert totals.max() - totals.min() <= max(cost.attention for cost in costs)


def test_micro_batches_with_few_pictures_come_first_and_last() -> None:
    costs = [RowCost(attention=1, vision=vision) for vision in (5, 1, 3, 2, 4)]
    order = order_rows(costs, 1, few_pictures_at_ends=True)
    assert [costs[row].vision for row in order] == [1, 3, 5, 4, 2]


def test_rows_of_like_cost_follow_each_other_where_all_is_encoded_first() -> None:
    costs = [RowCost(attention=cost, vision=6 - cost) for cost in (5, 1, 3, 2, 4)]
    order = order_rows(costs, 1, few_pictures_at_ends=False)
    assert [costs[row].attention for row in order] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("chunk_patches", [1, 50, 400, 100_000])
@pytest.mark.parametrize("num_ranks", [1, 3, 7])
def test_chunks_hold_all_frames_in_order_and_keep_the_limit(
    chunk_patches: int, num_ranks: int
) -> None:
    frames = np.random.default_rng(0).integers(4, 120, 63).tolist()
    cuts = cut_frames(frames, chunk_patches=chunk_patches, num_ranks=num_ranks, cost=COST)
    assert [frame for cut in cuts for frame in cut] == list(range(63))
    for cut in cuts:
        assert len(cut) == 1 or sum(frames[frame] for frame in cut) <= chunk_patches


def test_no_frames_make_no_chunks() -> None:
    assert cut_frames([], chunk_patches=10, num_ranks=3, cost=COST) == []


def test_large_frames_count_for_more_than_their_patches() -> None:
    frames = [500] * 4 + [20] * 100
    cuts = cut_frames(frames, chunk_patches=10_000, num_ranks=2, cost=COST)
    of_frames = COST.of_frames(np.array(frames))
    costs = [of_frames[cut.start : cut.stop].sum() for cut in cuts]
    assert len(cuts) == 2
    assert max(costs) < 1.2 * min(costs)


def test_lpt_assigns_the_longest_first_to_the_least_loaded_rank() -> None:
    load = {4: 0.0, 5: 3.0}
    assert lpt_assign([2.0, 5.0, 4.0], load) == [4, 4, 5]
    assert load == {4: 7.0, 5: 7.0}


@pytest.mark.parametrize("phase", ["dense", "indexer_warmup", "sparse"])
def test_one_long_document_costs_more_than_short_ones(phase: str) -> None:
    decoder = tiny_model().decoder
    assert attention_flops([64], decoder, phase) > 1.5 * attention_flops([16] * 4, decoder, phase)


def test_attention_counts_every_pair_once() -> None:
    decoder = tiny_model().decoder
    queries = np.arange(1, 31)
    scored = 2 * decoder.indexer.num_heads * decoder.indexer.head_dim * queries.sum()
    selected = np.minimum(queries, decoder.indexer.top_k).sum()
    expected = scored + 4 * decoder.num_heads * decoder.head_dim * selected
    assert attention_flops([30], decoder, "sparse") == expected
