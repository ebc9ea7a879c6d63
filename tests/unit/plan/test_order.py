# SPDX-License-Identifier: Apache-2.0
"""Passes are in Megatron's order, and exchanges in that of the first stage's passes."""

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_keye.config import DecoderParallel, ParallelConfig, VisionParallel
from megatron_keye.plan.cursor import ExchangeCursor
from megatron_keye.plan.order import pipeline_order, transport_order

GRIDS = [(1, 1, 3), (2, 1, 1), (4, 1, 6), (4, 1, 2), (2, 2, 4), (4, 3, 8), (2, 4, 2)]
"""Stages, virtual stages of each, micro-batches."""


@pytest.mark.parametrize(("stages", "virtual", "count"), GRIDS)
def test_every_pass_runs_once_in_megatrons_order(stages: int, virtual: int, count: int) -> None:
    degrees = DecoderParallel(pipeline=stages, virtual_stages=virtual)
    table = get_schedule_table(count, virtual, stages)
    for stage in range(stages):
        order = pipeline_order(degrees, count, stage)
        forwards = [(p.micro_batch, p.virtual_stage) for p in order if p.is_forward]
        backwards = [(p.micro_batch, p.virtual_stage) for p in order if not p.is_forward]
        assert forwards == table
        assert backwards == [(m, virtual - 1 - index) for m, index in table]


def test_one_forward_one_backward_after_the_warm_up() -> None:
    degrees = DecoderParallel(pipeline=3)
    order = [(p.is_forward, p.micro_batch) for p in pipeline_order(degrees, 4, 0)]
    forward, backward = True, False
    assert order == [
        (forward, 0),
        (forward, 1),
        (forward, 2),
        (backward, 0),
        (forward, 3),
        (backward, 1),
        (backward, 2),
        (backward, 3),
    ]


def layout(placement: str, shared: int = 0) -> ParallelConfig:
    num_ranks = int(placement == "dedicated")
    vision = VisionParallel(placement=placement, num_ranks=num_ranks, shared_micro_batches=shared)
    return ParallelConfig(decoder=DecoderParallel(pipeline=2), vision=vision)


def exchanges(placement: str, *, returns: bool = True) -> list[str]:
    order = transport_order(layout(placement), 3, {0, 2}, returns_gradients=returns)
    return [f"{exchange.kind[0]}{exchange.micro_batch}" for exchange in order]


def test_exchanges_follow_the_first_stage_and_skip_micro_batches_without_pictures() -> None:
    assert exchanges("dedicated") == ["f0", "g0", "f2", "g2"]
    assert exchanges("colocated") == ["f0", "f2", "g0", "g2"]
    assert exchanges("dedicated", returns=False) == ["f0", "f2"]


def test_exchanges_of_shared_ends_stand_around_the_others_and_each_rank_has_its_own() -> None:
    parallel = layout("dedicated", shared=1)
    order = transport_order(parallel, 4, range(4), returns_gradients=True)
    around, beside = ["f0", "f3"], ["f1", "f2", "g1", "g2"]
    expected = {0: [*around, *beside, "g0", "g3"], 1: [*around, "g0", "g3"], 2: beside}
    for rank, names in expected.items():
        cursor = ExchangeCursor(order, parallel, rank, num_micro_batches=4)
        assert [f"{e.kind[0]}{e.micro_batch}" for e in cursor.order] == names
        started = [f"{e.kind[0]}{e.micro_batch}" for e in cursor.take_ready(lambda _: True)]
        assert started == (beside if rank == 2 else around), "the rest when the schedule is there"
