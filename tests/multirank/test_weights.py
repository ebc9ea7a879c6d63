# SPDX-License-Identifier: Apache-2.0
"""A run that begins from weights trains as one that drew them, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.convert.convert import Options, hf_to_native, native_to_hf
from megatron_keye.checkpoint.optimizer_shards import optimizers_of, shards_of
from megatron_keye.config import ExpertsConfig, OptimizerConfig, RunConfig
from megatron_keye.optim.staged_adamw import MOMENTS
from tests.support.fused_adam import fused_adam
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import Batches, build_step, let_go, train

DRAWN_WITH = 1234
SCHEDULED = OptimizerConfig(
    learning_rate=1e-2,
    warmup_steps=1,
    schedule="linear",
    epsilon=1e-4,
    indexer_rate_multiplier=2.0,
)
BATCHES = [mixed_rows(step) for step in range(3)]
# Float64 is without the balancing loss, whose router computes in float32.
MODEL = tiny_model(
    experts=ExpertsConfig(
        num_experts=4, num_experts_per_token=2, intermediate_size=24, balance_loss_weight=0.0
    )
)


def begun(
    precision: str,
    *,
    phase: str = "sparse",
    shares: bool = False,
    seed: int = DRAWN_WITH,
    **degrees: Any,
) -> RunConfig:
    training = {
        "precision": precision,
        "phase": phase,
        "seed": seed,
        "optimizer": replace(SCHEDULED, distributed=shares),
    }
    return tiny_run(model=MODEL, training=training, **degrees)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a training checkpoint with the weights that a seed draws, in float32."""
    folder = tmp_path_factory.mktemp("drawn")
    train(begun("fp32"), [], save_to=folder)
    return folder / "tiny" / "checkpoints" / "step-00000000"


@pytest.fixture(scope="module")
def converted(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same weights after a way through the released form."""
    folder = tmp_path_factory.mktemp("converted")
    native_to_hf(drawn, folder / "hf", Options())
    hf_to_native(folder / "hf", folder / "native", begun("fp32"), Options())
    return folder / "native"


RUNS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp64": {"precision": "fp64"},
    "bf16": {"precision": "bf16"},
    "fp32, vision frozen": {"precision": "fp32", "phase": "indexer_warmup"},
    "bf16, shared": {"precision": "bf16", "shares": True, "data": 2, "expert": 2},
    "fp32, shared, vision alone": {"precision": "fp32", "shares": True, "vision_ranks": 1},
    "bf16, warm-up, tensor": {"precision": "bf16", "phase": "indexer_warmup", "tensor": 2},
    "bf16, warm-up, shared, vision alone": {
        **{"precision": "bf16", "phase": "indexer_warmup"},
        **{"shares": True, "vision_ranks": 1},
    },
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_it_trains_as_a_run_that_drew_the_weights(settings: dict[str, Any], drawn: Path) -> None:
    expected = train(begun(**settings), BATCHES)
    # Another seed, so that weights that are not loaded differ.
    got = train(begun(**settings, seed=5), BATCHES, weights_from=drawn)
    assert not got.changed(expected)
    assert [m.loss for m in got.metrics] == [m.loss for m in expected.metrics]


def test_also_from_a_converted_folder(converted: Path) -> None:
    run = begun("bf16", data=2, expert=2, shares=True, seed=5)
    got = train(run, BATCHES, weights_from=converted)
    assert not got.changed(train(begun("bf16", data=2, expert=2, shares=True), BATCHES))


FUSED: dict[str, dict[str, Any]] = {
    name: RUNS[name] for name in ("fp32", "bf16, shared", "bf16, warm-up, shared, vision alone")
}


@pytest.mark.parametrize("settings", FUSED.values(), ids=FUSED)
def test_also_with_a_fused_optimizer_and_after_resuming(
    settings: dict[str, Any], drawn: Path, tmp_path: Path
) -> None:
    fused = {"with_fused_adam": True}
    expected = train(begun(**settings), BATCHES, **fused)
    first = begun(**settings, seed=5)
    train(first, BATCHES[:2], weights_from=drawn, save_to=tmp_path, **fused)
    saved = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    resumed = train(first, BATCHES[2:], load_from=saved, **fused)
    assert not resumed.changed(expected)


@pytest.fixture(scope="module")
def warmed_up(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a warm-up on another grid in another precision, after two steps."""
    folder = tmp_path_factory.mktemp("warmed-up")
    train(begun("bf16", phase="indexer_warmup", tensor=2), BATCHES[:2], save_to=folder)
    return folder / "tiny" / "checkpoints" / "step-00000002"


def test_the_weights_of_another_phase_grid_and_precision_begin_a_run(
    warmed_up: Path, drawn: Path, tmp_path: Path
) -> None:
    handed_over = train(
        begun("bf16", phase="indexer_warmup", tensor=2), [], load_from=warmed_up
    ).weights
    run = begun("fp32", seed=5)
    begins = train(run, [], weights_from=warmed_up).weights
    assert begins.keys() == handed_over.keys()
    assert not [n for n, w in begins.items() if not torch.equal(w, handed_over[n].float())]
    whole = train(run, BATCHES, weights_from=warmed_up)
    train(run, BATCHES[:2], weights_from=warmed_up, save_to=tmp_path)
    saved = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    assert not train(run, BATCHES[2:], load_from=saved).changed(whole)


def _state(run_json: str, weights: Path, batches: Batches) -> list[tuple[set[float], float]]:
    """Return the counts of updates and the largest moment, after loading and after each step."""
    run = RunConfig.from_json(run_json)
    grid, model, optimizer, step = build_step(run)
    training_checkpoint.load_weights(weights, run, model, optimizer, grid)
    found = []
    for number in range(len(batches) + 1):
        if number:
            step(batches[number - 1], number - 1)
        inner = [part.optimizer for part in optimizers_of(optimizer)]
        counts = {float(kept["step"]) for part in inner for kept in part.state.values()}
        shards = [shard for part in optimizers_of(optimizer) for shard in shards_of(part)]
        found.append((counts, max(float(s.kept[m].abs().max()) for s in shards for m in MOMENTS)))
    let_go(model)
    return found


def test_moments_begin_at_zero_and_count_every_update(warmed_up: Path) -> None:
    run = begun("bf16", data=2, expert=2, shares=True)
    for rank in run_on_ranks(2, _state, run.to_json(), warmed_up, BATCHES[:2]):
        assert [counts for counts, _ in rank] == [{0.0}, {1.0}, {2.0}]
        assert rank[0][1] == 0 and rank[1][1] > 0


def _save_first(run_json: str, folder: Path) -> list[float]:
    """Save before the first update, as after a step that was skipped, then train."""
    run = replace(RunConfig.from_json(run_json), output_dir=str(folder))
    grid, model, optimizer, step = build_step(run)
    progress = training_checkpoint.Progress(step=1, updates=0, data={})
    training_checkpoint.save(run, model, optimizer, grid, progress)
    losses = [step(rows, number).loss for number, rows in enumerate(BATCHES)]
    let_go(model)
    return losses


def test_saving_before_the_first_update_changes_nothing(tmp_path: Path) -> None:
    run = begun("fp32")
    (losses,) = run_on_ranks(1, _save_first, run.to_json(), tmp_path)
    assert losses == [m.loss for m in train(run, BATCHES).metrics]


def _refusal(run_json: str, weights: Path) -> str:
    """Return the error of loading; a rank that raised would have to be restarted."""
    run = RunConfig.from_json(run_json)
    grid, model, optimizer, _ = build_step(run)
    try:
        training_checkpoint.load_weights(weights, run, model, optimizer, grid)
    except ValueError as error:
        return str(error)
    finally:
        let_go(model)
    return "nothing"


def test_weights_in_the_folder_that_will_be_set_aside_are_refused(drawn: Path) -> None:
    run = replace(begun("fp32"), output_dir=str(drawn.parents[2]))
    (refusal,) = run_on_ranks(1, _refusal, run.to_json(), drawn)
    assert "give the run another name" in refusal


def test_float64_is_refused_where_the_optimizer_is_a_fused_one() -> None:
    assert run_on_ranks(1, _refusal_of_float64, begun("fp64").to_json()) == [True]


def _refusal_of_float64(run_json: str) -> bool:
    with fused_adam(), pytest.raises(ValueError, match=r"training\.precision: got 'fp64'"):
        build_step(RunConfig.from_json(run_json))
    return True
