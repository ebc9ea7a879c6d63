# SPDX-License-Identifier: Apache-2.0
"""The balanced schedule is faster than others on a realistic mix of lengths."""

import json

import numpy as np
import pytest

from megatron_keye.cli.simulate import main, with_grid
from megatron_keye.estimate.forecast import Forecast, Speeds, play_dedicated
from megatron_keye.estimate.length_mix import draw_rows
from megatron_keye.estimate.workload import (
    NO_PICTURES,
    RowShape,
    balance_shapes,
    plan_balanced,
    plan_dealt,
)
from megatron_keye.recipes import load_recipe
from tests.support.tiny import tiny_run


def test_balance_pays_and_ranks_hardly_idle_at_64_ranks() -> None:
    run = with_grid(load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True), 64)
    rows = draw_rows(np.random.default_rng(0), run.training.rows_per_step, run.data.row_tokens)
    balanced = balance_shapes(rows, run)
    ours = Forecast(balanced, run, Speeds()).play(plan_balanced(balanced, run))
    plain = Forecast(rows, run, Speeds())
    assert ours.mean_idle_share <= 0.08
    assert plain.play(plan_dealt(rows, run, deal="documents")).seconds >= 1.2 * ours.seconds
    assert plain.play(plan_dealt(rows, run, deal="counts")).seconds >= 1.1 * ours.seconds
    assert plain.play_on_first_stage().seconds >= 1.1 * ours.seconds


def test_ranks_idle_at_most_5_percent_colocated_and_12_with_shared_ends_at_512() -> None:
    run = with_grid(load_recipe("keye_30b_a3b")(num_ranks=512, has_gpu=True), 512)
    rows = draw_rows(np.random.default_rng(0), run.training.rows_per_step, run.data.row_tokens)
    balanced = balance_shapes(rows, run)
    assert Forecast(balanced, run, Speeds()).play(
        plan_balanced(balanced, run)
    ).mean_idle_share <= (0.05)
    shared = play_dedicated(rows, run, Speeds(), num_vision_ranks=61, shared_micro_batches=4)
    assert shared.mean_idle_share <= 0.12
    alone = play_dedicated(rows, run, Speeds(), num_vision_ranks=95, shared_micro_batches=0)
    assert shared.seconds * shared.num_ranks < 0.95 * alone.seconds * alone.num_ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--ranks", "100"],
            "--ranks: got 100, expected a multiple of 64, the ranks of a replica",
        ),
        (["--ranks", "20000"], "--ranks: got 20000, expected 8 to 16384"),
        (["--ranks", "64", "--rows", "3"], "training.rows_per_step: got 3, expected a multiple"),
    ],
)
def test_ranks_that_cannot_be_laid_out_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keye_30b_a3b", *arguments]) != 0
    assert message in capsys.readouterr().err


def test_a_layout_of_the_settings_is_simulated_with_as_many_replicas_as_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["--set", "parallel.decoder.pipeline=2", "--set", "parallel.decoder.context=4"]
    few = ["--ranks", "48", "--rows", "2", "--steps", "1", "--balanced-only", "--json"]
    assert main(["keye_30b_a3b", *few, *settings]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["schedule"].split(",")[0] for result in results] == [
        "colocated",
        "dedicated",
        "dedicated",
    ]
    assert results[0]["ranks"] == 48 and all(0 < r["idle_share"] < 1 for r in results)


def test_rows_are_full_and_pictures_lie_inside_documents() -> None:
    rows = draw_rows(np.random.default_rng(0), 4, 262_144)
    for row in rows:
        assert sum(row.document_lengths) == 262_144
        starts, _, tokens = row.pictures
        assert (starts[:-1] + tokens[:-1] < starts[1:]).all()


def test_a_stage_of_more_layers_works_longer() -> None:
    run = tiny_run(pipeline=2, first_stage_layers=1)
    rows = [RowShape(document_lengths=(run.data.row_tokens,), pictures=NO_PICTURES)] * 4
    played = Forecast(rows, run, Speeds()).play(plan_balanced(rows, run))
    first, last = played.busy_seconds
    assert np.isclose(last, 3 * first)
