# SPDX-License-Identifier: Apache-2.0
"""Rows become a plan: misplaced pictures are refused, and balancing only reorders rows."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_keye.data.placeholders import picture_slots
from megatron_keye.estimate.workload import balance_shapes, shape_of
from megatron_keye.plan.cost import attention_flops
from megatron_keye.plan.slots import RowSizes, balanced_order
from megatron_keye.training.metrics import count_batch
from megatron_keye.training.microbatch import (
    balance_rows,
    plan_rows,
)
from tests.support.tiny import VIDEO, mixed_rows, tiny_run


def test_a_picture_beside_its_placeholders_is_refused_by_name() -> None:
    rows = mixed_rows(0)
    starts = (rows[2].picture_starts[0] + 1, *rows[2].picture_starts[1:])
    rows[2] = replace(rows[2], picture_starts=starts)
    with pytest.raises(ValueError, match=r"sample 2-0: position 1 of row 2.*placeholder without"):
        picture_slots(rows, tiny_run())


def test_a_placeholder_without_a_picture_is_refused_by_name() -> None:
    rows = mixed_rows(0)
    token_ids = rows[1].token_ids.copy()
    token_ids[25] = VIDEO
    rows[1] = replace(rows[1], token_ids=token_ids)
    with pytest.raises(ValueError, match=r"sample 1-1: position 25 of row 1, for replica 1"):
        picture_slots(rows, tiny_run(data=2))


def test_balanced_rows_are_the_same_rows() -> None:
    rows = mixed_rows(0)
    for data in (1, 2, 4):
        ordered = balance_rows(rows, tiny_run(data=data))
        assert sorted(map(id, ordered)) == sorted(map(id, rows))


def test_planning_is_deterministic() -> None:
    run = tiny_run(data=2, pipeline=2, vision_ranks=3)
    plans = [plan_rows(balance_rows(mixed_rows(0), run), run) for _ in range(2)]
    assert plans[0].chunks == plans[1].chunks
    assert plans[0].exchanges == plans[1].exchanges
    for mine, theirs in zip(plans[0].transfers, plans[1].transfers, strict=True):
        assert (mine.tag, mine.source, mine.destination) == (
            theirs.tag,
            theirs.source,
            theirs.destination,
        )
        assert np.array_equal(mine.feature_rows, theirs.feature_rows)
        assert np.array_equal(mine.positions, theirs.positions)


def test_rows_that_attend_densely_have_no_indexer_loss() -> None:
    rows = mixed_rows(0)
    assert [row.longest_document for row in rows] == [35, 35, 21, 34]
    real = [row.num_real_tokens for row in rows]
    for dense_up_to, sparse in ((0, real), (33, [*real[:2], real[3]]), (34, real[:2]), (35, [])):
        run = tiny_run(training={"dense_up_to": dense_up_to})
        assert count_batch(rows, run).indexer_queries == sum(sparse)
    for phase, queries in (
        ("dense", 0),
        ("indexer_warmup", sum(row.num_real_tokens for row in rows)),
    ):
        run = tiny_run(training={"phase": phase})
        assert count_batch(rows, run).indexer_queries == queries


def test_a_rows_cost_is_that_of_the_attention_it_gets() -> None:
    decoder = tiny_run().model.decoder
    lengths = [[40, 24], [34, 30]]
    dense, sparse = (
        [attention_flops(each, decoder, phase) for each in lengths]
        for phase in ("dense", "sparse")
    )
    assert dense[1] > sparse[0] > sparse[1], "the setting decides which of the two costs more"
    sizes = [RowSizes(each, []) for each in lengths]
    for dense_up_to, order in ((0, [0, 1]), (34, [1, 0])):
        run = tiny_run(training={"dense_up_to": dense_up_to, "rows_per_step": 2})
        assert balanced_order(sizes, run) == order, "the more expensive one first"


def test_the_forecast_orders_rows_as_training_does() -> None:
    run = tiny_run(training={"dense_up_to": 34})
    rows = balance_rows(mixed_rows(0), run)
    shapes = balance_shapes([shape_of(row, run) for row in mixed_rows(0)], run)
    for shape, row in zip(shapes, rows, strict=True):
        expected = shape_of(row, run)
        assert shape.document_lengths == expected.document_lengths
        assert all(map(np.array_equal, shape.pictures, expected.pictures))
