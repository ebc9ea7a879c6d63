# SPDX-License-Identifier: Apache-2.0
"""The simulator's arrays say of a step what training's plan of it says, token by token."""

from collections import Counter

import numpy as np
import pytest

from megatron_keye.config import RunConfig
from megatron_keye.estimate.traffic import Links, exchange_seconds
from megatron_keye.estimate.workload import (
    BatchPictures,
    PictureSizes,
    RowShape,
    plan_balanced,
    work_of,
)
from megatron_keye.plan.slots import plan_slots
from megatron_keye.plan.step import PictureSlot, StepPlan
from tests.support.tiny import ROW_TOKENS, tiny_run

LAYOUTS = [
    {"tensor": 2, "context": 2, "data": 2},
    {"context": 2, "data": 2, "vision_ranks": 3},
    {"tensor": 2, "pipeline": 2, "data": 2, "vision_ranks": 2, "shared_micro_batches": 1},
]


def run_of(layout: dict[str, int]) -> RunConfig:
    return tiny_run(chunk_patches=60, training={"rows_per_step": 8}, **layout)


def random_rows() -> list[RowShape]:
    generator, rows = np.random.default_rng(0), []
    for _ in range(8):
        tokens = generator.integers(1, 13, generator.integers(0, 5))
        starts = np.cumsum(tokens + 1) - tokens
        pictures = PictureSizes(starts, 4 * tokens, tokens)
        rows.append(RowShape(document_lengths=(ROW_TOKENS,), pictures=pictures))
    return rows


def planned(rows: list[RowShape], run: RunConfig) -> StepPlan:
    slots = [
        PictureSlot(row, index, *map(int, picture))
        for row, shape in enumerate(rows)
        for index, picture in enumerate(zip(*shape.pictures, strict=True))
    ]
    return plan_slots(slots, len(rows), run)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_chunks_and_exchanges_are_those_of_training(layout: dict[str, int]) -> None:
    run, rows = run_of(layout), random_rows()
    got, expected = plan_balanced(rows, run), work_of(planned(rows, run), 2)
    assert got.exchanges == expected.exchanges
    for name in ("ranks", "num_pictures", "first_micro_batch", "last_micro_batch", "has_pictures"):
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_exchange_takes_as_long_as_its_busiest_rank_in_trainings_plan(
    layout: dict[str, int],
) -> None:
    run, rows = run_of(layout), random_rows()
    links = Links(ranks_per_node=3, node_gigabytes_per_second=7.0, link_gigabytes_per_second=2.0)
    bytes_by: Counter[tuple[int, bool, str, int]] = Counter()
    for transfer in planned(rows, run).transfers:
        ends = {"from": transfer.source, "to": transfer.destination}
        crosses = transfer.source // 3 != transfer.destination // 3
        if transfer.source != transfer.destination:
            for end, rank in ends.items():
                size = 2 * run.model.decoder.hidden_size * len(transfer.positions)
                bytes_by[transfer.micro_batch, crosses, end, rank] += size
    expected = [0.0] * 4
    for (micro_batch, crosses, _, _), size in bytes_by.items():
        seconds = size / (2e9 if crosses else 7e9)
        expected[micro_batch] = max(expected[micro_batch], seconds)
    got = exchange_seconds(BatchPictures.of_rows(rows), plan_balanced(rows, run), run, links)
    assert got == pytest.approx(expected) and max(got) > 0
