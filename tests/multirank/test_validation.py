# SPDX-License-Identifier: Apache-2.0
"""Validation is the same on every grid, equals training's loss, and leaves no trace in it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_keye.config import RunConfig
from megatron_keye.data.media import Medium
from megatron_keye.data.row import PackedRow
from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid
from megatron_keye.training.validation import Validation, ValidationResult
from tests.support.ranks import run_on_ranks
from tests.support.tiny import (
    SyntheticPatches,
    mixed_rows,
    packed_row,
    text_rows,
    tiny_run,
)
from tests.support.train import LOSS_TOLERANCE, build_step, let_go

# Neither number of rows fills the batches of a grid.
SOURCES = {"video": [*mixed_rows(7), *mixed_rows(8)[:2]], "text": text_rows(1)[:3]}
BATCHES = [mixed_rows(0), mixed_rows(1)]


def make_validation(
    run: RunConfig, grid: Grid, model: KeyeModel, sources: dict[str, list[PackedRow]]
) -> Validation:
    return Validation(
        run,
        grid,
        model,
        sources,
        padding_row=packed_row(0),
        open_patches=lambda: SyntheticPatches() if model.vision is not None else None,
        device=torch.device("cpu"),
    )


def train_and_validate(run: RunConfig, *, validates: bool = True) -> list[tuple[Any, ...]]:
    """Return what the first rank saw: the losses before each step, and the step's metrics."""
    ranks = run.parallel.num_ranks
    return run_on_ranks(ranks, _on_rank, run.to_json(), SOURCES, validates)[0]


def _on_rank(run_json: str, sources: dict[str, list[PackedRow]], validates: bool) -> Any:
    run = RunConfig.from_json(run_json)
    grid, model, _, step = build_step(run)
    validation = make_validation(run, grid, model, sources)
    seen = []
    for number, rows in enumerate(BATCHES):
        step.announce(rows)
        random = torch.get_rng_state()
        losses = validation() if validates else None
        assert torch.equal(torch.get_rng_state(), random), "validation drew random numbers"
        metrics = step(rows, number)
        figures = (metrics.loss, metrics.gradient_norm, metrics.indexer_kl, metrics.router_load)
        seen.append((losses, *figures, metrics.pictures))
    let_go(model)
    return seen


def assert_same_losses(got: ValidationResult, expected: ValidationResult) -> None:
    assert got.figures().keys() == expected.figures().keys() == {"video", "text", "all"}
    for source, figures in expected.figures().items():
        # Recall is sampled at other queries where a row is cut.
        for name in ("loss", "indexer_kl"):
            mine = got.figures()[source][name]
            assert mine == pytest.approx(figures[name], rel=LOSS_TOLERANCE), (source, name)


@pytest.fixture(scope="module")
def on_one_rank() -> list[tuple[Any, ...]]:
    return train_and_validate(tiny_run())


@pytest.mark.parametrize(
    "degrees",
    [
        {"pipeline": 2, "context": 2},
        {"vision_ranks": 1, "data": 2},
        {"vision_ranks": 1, "pipeline": 2, "virtual_stages": 2},
        {"tensor": 2, "expert": 2},
    ],
    ids=["pipeline x context", "vision and data", "vision and interleaved", "tensor and expert"],
)
def test_losses_do_not_depend_on_the_grid(
    degrees: dict[str, int], on_one_rank: list[tuple[Any, ...]]
) -> None:
    seen = train_and_validate(tiny_run(**degrees))
    for (got, *_), (expected, *_) in zip(seen, on_one_rank, strict=True):
        assert_same_losses(got, expected)


FROZEN = {"training": {"frozen": ("vision", "projector")}}


@pytest.mark.parametrize(
    "options",
    [{}, {"vision_ranks": 1}, {"vision_ranks": 1, **FROZEN}],
    ids=["one rank", "vision rank", "vision rank that works ahead"],
)
def test_training_is_bit_for_bit_the_same_without_it(options: dict[str, Any]) -> None:
    seen = train_and_validate(tiny_run(**options))
    without = train_and_validate(tiny_run(**options), validates=False)
    assert [figures for _, *figures in seen] == [figures for _, *figures in without]


@pytest.mark.parametrize(
    "training",
    [{}, {"phase": "dense"}, {"phase": "indexer_warmup"}, {"recompute": "selective"}],
    ids=["sparse", "dense", "warm-up", "recomputed"],
)
def test_it_is_the_loss_of_training_before_the_update(training: dict[str, object]) -> None:
    run = tiny_run(training=training)
    ((losses, metrics),) = run_on_ranks(1, _same_rows, run.to_json())
    for name in ("loss", "indexer_kl", "indexer_recall"):
        expected = getattr(metrics, name)
        assert getattr(losses.total, name) == pytest.approx(expected, rel=1e-12, nan_ok=True), name


def _same_rows(run_json: str) -> Any:
    run = RunConfig.from_json(run_json)
    grid, model, _, step = build_step(run)
    rows = mixed_rows(0)
    losses = make_validation(run, grid, model, {"rows": rows})()
    metrics = step(rows, 0)
    let_go(model)
    return losses, metrics


def test_a_sample_that_does_not_decode_is_left_out_on_all_ranks() -> None:
    run = tiny_run(vision_ranks=1)
    run = replace(run, data=replace(run.data, on_bad_sample="skip"))
    results = run_on_ranks(2, _with_damage, run.to_json())
    (got, expected), *others = results
    assert got.num_damaged == 1 and expected.num_damaged == 0
    assert got.total.loss == pytest.approx(expected.total.loss, rel=1e-6)
    assert all(other == results[0] for other in others)


def _with_damage(run_json: str) -> Any:
    run = RunConfig.from_json(run_json)
    grid, model, _, _ = build_step(run)
    row = mixed_rows(0)[2]
    pictures = tuple(
        replace(picture, medium=Medium(f"damaged {picture.medium.path}", "video"))
        if index == 0
        else picture
        for index, picture in enumerate(row.pictures)
    )
    labels = row.labels.copy()
    labels[: row.document_bounds[1]] = -100
    damaged = replace(row, pictures=pictures)
    losses = []
    for rows in ([damaged], [replace(damaged, labels=labels, pictures=row.pictures)]):
        losses.append(make_validation(run, grid, model, {"rows": rows})())
    let_go(model)
    return losses
