# SPDX-License-Identifier: Apache-2.0
"""A sample whose file does not decode has no loss, and all ranks agree on that."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_keye.config import RunConfig
from megatron_keye.data.media import Medium
from megatron_keye.data.row import IGNORED_LABEL, PackedRow
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import assert_same_training, build_step, let_go, train


def skipping(run: RunConfig) -> RunConfig:
    return replace(run, data=replace(run.data, on_bad_sample="skip"))


def damaged_rows(step: int) -> list[PackedRow]:
    """Return a batch whose second row with pictures has a damaged file in its first document."""
    rows = mixed_rows(step)
    pictures = [
        replace(picture, medium=Medium(f"damaged {picture.medium.path}", "video"))
        if index == 0
        else picture
        for index, picture in enumerate(rows[2].pictures)
    ]
    return [*rows[:2], replace(rows[2], pictures=tuple(pictures)), rows[3]]


def without_first_document(rows: list[PackedRow]) -> list[PackedRow]:
    labels = rows[2].labels.copy()
    labels[: rows[2].document_bounds[1]] = IGNORED_LABEL
    assert not np.array_equal(labels, rows[2].labels), "the sample had no label to lose"
    return [*rows[:2], replace(rows[2], labels=labels), rows[3]]


@pytest.mark.parametrize("degrees", [{}, {"pipeline": 2}, {"vision_ranks": 1}])
def test_a_damaged_sample_loses_its_loss_and_nothing_else(degrees: dict[str, int]) -> None:
    batches = [damaged_rows(0), mixed_rows(1)]
    expected = train(tiny_run(**degrees), [without_first_document(batches[0]), batches[1]])
    got = train(skipping(tiny_run(**degrees)), batches)
    assert got.metrics[0].loss == expected.metrics[0].loss, "not bit for bit the same"
    assert_same_training(got, expected)


def steps_until_refused(run_json: str) -> tuple[int, str]:
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    row = damaged_rows(0)[2]
    pictures = tuple(
        replace(picture, medium=Medium("damaged", "video")) for picture in row.pictures
    )
    for number in range(20):
        try:
            step([replace(row, pictures=pictures)] * 4, number)
        except ValueError as error:
            let_go(model)
            return number, str(error)
    return 20, ""


def test_a_run_in_which_nothing_decodes_ends() -> None:
    ((steps, reason),) = run_on_ranks(1, steps_until_refused, skipping(tiny_run()).to_json())
    assert steps == 10 and "no picture decoded in 11 steps" in reason and "is damaged" in reason


def damaged_of_steps(run_json: str) -> Any:
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    damaged = []
    for number, rows in enumerate((damaged_rows(0), mixed_rows(1))):
        step(rows, number)
        damaged.append(step.damaged)
    let_go(model)
    return damaged


def test_every_rank_names_the_damaged_sample() -> None:
    run = skipping(tiny_run(vision_ranks=1))
    answers = run_on_ranks(run.parallel.num_ranks, damaged_of_steps, run.to_json())
    assert answers == [[["sample 2-0: is damaged"], []]] * 2
