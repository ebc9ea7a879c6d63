"""The balanced schedule is faster than others on a realistic mix of lengths."""

import numpy as np

from megatron_keye.cli.simulate import with_grid
from megatron_keye.estimate.forecast import Forecast, Speeds
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
