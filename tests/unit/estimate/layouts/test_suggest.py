# SPDX-License-Identifier: Apache-2.0
"""Suggested layouts use all GPUs, fit, are the fastest that do, and train as they are printed."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.layouts import search
from megatron_keye.estimate.layouts.choices import choices, needed_bytes, usable_bytes
from megatron_keye.estimate.layouts.grids import grids, has_grid, nearest
from megatron_keye.estimate.layouts.search import find_layouts
from megatron_keye.estimate.layouts.suggest import settings_of, suggest_layouts
from megatron_keye.estimate.length_mix import draw_rows
from megatron_keye.estimate.memory import RESERVED_BYTES
from megatron_keye.estimate.prediction.machines import H100
from megatron_keye.estimate.prediction.mix import RowMix
from megatron_keye.estimate.prediction.step import Predictor
from megatron_keye.estimate.workload import RowShape
from megatron_keye.recipes import load_recipe
from tests.support.tiny import tiny_run

TINY = tiny_run(training={"precision": "bf16", "rows_per_step": 4})


def rows_of(run: RunConfig) -> list[RowShape]:
    generator = np.random.default_rng(0)
    return draw_rows(generator, run.training.rows_per_step, run.data.row_tokens)


def predictor_of(run: RunConfig, memory_gibibytes: float = H100.memory_gibibytes) -> Predictor:
    sizes = [row.sizes for row in rows_of(run)]
    return Predictor(RowMix(sizes, run), replace(H100, memory_gibibytes=memory_gibibytes))


@pytest.fixture(scope="module")
def tiny() -> RunConfig:
    run = load_recipe("keye_tiny")(num_ranks=4, has_gpu=True)
    return replace(run, training=replace(run.training, rows_per_step=4))


@pytest.mark.parametrize("num_gpus", [1, 2, 6, 7])
def test_every_grid_has_all_ranks_and_is_one_that_training_takes(
    tiny: RunConfig, num_gpus: int
) -> None:
    found = list(grids(tiny, num_gpus))
    assert found and len(set(found)) == len(found)
    assert all(parallel.num_ranks == num_gpus for parallel in found)
    for parallel in found:
        replace(tiny, parallel=parallel).check_num_ranks(num_gpus)


def test_the_search_finds_what_comparing_everything_finds(tiny: RunConfig) -> None:
    fits = usable_bytes(H100.memory_gibibytes * 2**30)
    everything = [
        chosen
        for parallel in grids(tiny, 4)
        for chosen in choices(replace(tiny, parallel=parallel))
    ]
    needs = sorted(map(needed_bytes, everything))
    # So little memory that half of everything does not fit.
    usable = needs[len(needs) // 2]
    assert usable < fits
    predictor = predictor_of(tiny, (1.05 * usable + RESERVED_BYTES) / 2**30)
    found = find_layouts(tiny, 4, predictor, most=10_000)
    seconds = [predictor.predict(r).seconds for r in everything if needed_bytes(r) <= usable]
    assert found[0].time.seconds == pytest.approx(min(seconds))
    assert all(layout.needed_bytes <= usable for layout in found)
    times = [layout.time.seconds for layout in found]
    assert times == sorted(times)
    kinds = {search._kind(r.parallel) for r in everything if needed_bytes(r) <= usable}
    assert len(found) == len(kinds), "one layout of each kind"


@pytest.mark.parametrize(("recipe", "num_gpus"), [("keye_tiny", 4), ("keye_30b_a3b", 8)])
def test_settings_are_those_that_training_reads_back(recipe: str, num_gpus: int) -> None:
    run = load_recipe(recipe)(num_ranks=num_gpus, has_gpu=True)
    suggestions = suggest_layouts(run, rows_of(run), num_gpus, H100, most=4, num_simulated=1)
    assert [s.is_simulated for s in suggestions[:2]] == [True, False][: len(suggestions)]
    for suggestion in suggestions:
        wanted = suggestion.layout.run
        assert run.with_overrides(settings_of(wanted, run)) == wanted
        assert wanted.parallel.num_ranks == num_gpus
        assert suggestion.seconds > 0 and 0 <= suggestion.idle_share < 1


def test_state_is_kept_elsewhere_only_where_nothing_fits_else() -> None:
    run = load_recipe("keye_30b_a3b")(num_ranks=8, has_gpu=True)
    run = replace(run, training=replace(run.training, rows_per_step=1))
    for gibibytes, is_kept in ((140.0, True), (79.1, False)):
        (best, *_) = find_layouts(run, 8, predictor_of(run, gibibytes), most=1)
        assert (best.run.training.optimizer == run.training.optimizer) == is_kept


def test_what_would_fit_is_said_where_nothing_does() -> None:
    run = load_recipe("keye_30b_a3b")(num_ranks=4, has_gpu=True)
    with pytest.raises(UserError, match="no layout of keye_30b_a3b fits: a GPU needs") as error:
        suggest_layouts(run, rows_of(run), 4, H100)
    message = str(error.value)
    assert "what would fit: 8 GPUs, data.row_tokens=65536, low-rank adapters" in message
    shorter = run.with_overrides(["data.row_tokens=65536"])
    assert find_layouts(shorter, 4, predictor_of(shorter), most=1)


def test_a_number_that_divides_nothing_is_refused_with_the_nearest() -> None:
    # At most 4 tensor x 4 pipeline x 8 context x 4 data ranks, and as many for vision.
    with pytest.raises(UserError, match="--gpus: got 5000, .* the nearest are 1024"):
        suggest_layouts(TINY, [], 5000, H100)
    assert not has_grid(TINY, 1025) and has_grid(TINY, 1024)
    assert nearest(TINY, 5000) == [1024]
    odd = tiny_run(training={"rows_per_step": 1})
    assert all(has_grid(odd, number) for number in nearest(odd, 10_000))
