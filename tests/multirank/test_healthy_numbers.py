# SPDX-License-Identifier: Apache-2.0
"""A number that is not finite is found in its step, wherever it is, and changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.optimizer_shards import optimizers_of, shards_of
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.training.chunk_encoder import ChunkEncoder
from megatron_keye.training.health.roll_back import WayBack
from megatron_keye.training.health.sick_tensors import check_before_save
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import build_step, let_go

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "shared optimizer, masters": {"data": 2, "training": {"precision": "bf16"}},
    "dedicated vision": {"vision_ranks": 1},
    "state in main memory": {"data": 2, "training": {"precision": "bf16"}},
}


def run_of(layout: str) -> RunConfig:
    run = tiny_run(**LAYOUTS[layout])
    if "main memory" not in layout:
        return run
    optimizer = replace(run.training.optimizer, offload=1.0)
    return replace(run, training=replace(run.training, optimizer=optimizer))


@contextmanager
def changed(tensor: Tensor, value: float) -> Iterator[None]:
    """Put a number into a tensor, and what was there back at the end."""
    flat = tensor.detach().view(-1)
    before = flat[-1].clone()
    flat[-1] = value
    try:
        yield
    finally:
        flat[-1] = before


@contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Put another method in the place of one, which it gets as its first argument."""
    working = getattr(owner, name)
    setattr(owner, name, lambda *arguments: method(working, *arguments))
    try:
        yield
    finally:
        setattr(owner, name, working)


def _bad_features(working: Any, encoder: Any, chunk: int) -> Tensor:
    features: Tensor = working(encoder, chunk)
    features[0, 0] = torch.nan
    return features


def _poisons(model: Any, optimizer: Any, *, is_here: bool) -> dict[str, Any]:
    """Return the ways in which one rank's numbers become bad."""
    module = model.wrapped()[0].module
    shards = [shard for each in optimizers_of(optimizer) for shard in shards_of(each)]
    # One that the step does not read: the last token of the vocabulary.
    kept = next(shard.kept for shard in shards if shard.weight.dim() == 2)
    tensors = {
        "weight": (next(p for p in module.parameters() if p.dim() == 1), torch.nan),
        "first moment": (kept["exp_avg"], torch.nan),
        "second moment": (kept["exp_avg_sq"], -1.0),
    }
    if "master" in kept:
        tensors["master"] = (kept["master"], torch.inf)
    poisons: dict[str, Any] = {
        kind: changed(tensor, value if is_here else float(tensor.detach().view(-1)[-1]))
        for kind, (tensor, value) in tensors.items()
    }
    if is_here and model.vision is not None:
        poisons["feature"] = replaced(ChunkEncoder, "encode", _bad_features)
    return poisons


def _poisoned_steps(run_json: str, victim: int) -> dict[str, Any]:
    """Return what becomes of a step of each kind of bad number on one rank."""
    grid, model, optimizer, step = build_step(RunConfig.from_json(run_json))
    parts = (model, optimizer, grid)
    step(mixed_rows(0), 0)
    results: dict[str, Any] = {}
    weights = [weight for wrapped in model.wrapped() for weight in wrapped.parameters()]
    kinds = ["weight", "first moment", "second moment", "master", "feature"]
    for kind in kinds:
        poisons = _poisons(model, optimizer, is_here=grid.rank == victim)
        if kind == "master" and "bf16" not in run_json:
            continue
        with poisons.get(kind, changed(torch.zeros(1), 0.0)):
            before = [weight.detach().clone() for weight in weights]
            metrics = step(mixed_rows(1), 1)
            pairs = zip(before, weights, strict=True)
            is_same = all(torch.equal(old.nan_to_num(7), new.nan_to_num(7)) for old, new in pairs)
            try:
                check_before_save(*parts, step=2, kept=Path("good"))
                refusal = ""
            except UserError as error:
                refusal = str(error)
        finding = step._judge.finding
        results[kind] = (metrics.was_applied, is_same, finding, refusal)
    results["afterwards"] = step(mixed_rows(1), 1).was_applied
    let_go(model)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_number_on_one_rank_changes_nothing_on_any(layout: str) -> None:
    run = run_of(layout)
    num_ranks = run.parallel.num_ranks
    victim = num_ranks - 1
    answers = run_on_ranks(num_ranks, _poisoned_steps, run.to_json(), victim)
    for answer in answers:
        assert answer.pop("afterwards"), "the numbers are good again"
        for kind, (was_applied, is_same, finding, refusal) in answer.items():
            assert not was_applied and is_same, kind
            # Of several bad steps in a row the first alone is computed again.
            assert ("same to the bit" in finding.verdict) == (kind == "weight"), kind
            where = {"weight": "loss", "feature": "gradients", "master": "weights"}.get(
                kind, f"{kind}s"
            )
            assert where in finding.sick_ranks, (kind, finding)
            if kind == "feature":
                assert not finding.sick_tensors and not refusal
                continue
            (named,) = finding.sick_tensors
            assert named.endswith(f"(rank {victim})"), named
            assert f"in {named}, expected none; good stays" in refusal
        assert answer.keys() == answers[0].keys()


def _perturbed_pass(run_json: str, value: float) -> Any:
    """Return the finding of a step whose first computation was disturbed on rank 1."""
    grid, model, optimizer, step = build_step(RunConfig.from_json(run_json))
    step(mixed_rows(0), 0)
    calls = []

    def finish(working: Any, divisor: float) -> None:
        calls.append(divisor)
        if grid.rank == 1 and len(calls) == 1:
            model.wrapped()[0].buffers[0].grad_data[0] = value
        working(divisor)

    with replaced(optimizer, "finish_gradients", finish):
        was_applied = step(mixed_rows(1), 1).was_applied
    let_go(model)
    return was_applied, len(calls), step._judge.finding


def test_a_step_that_does_not_repeat_names_the_rank_whose_hardware_is_suspect() -> None:
    run = tiny_run(data=2)
    for was_applied, num_calls, finding in run_on_ranks(
        2, _perturbed_pass, run.to_json(), torch.nan
    ):
        assert not was_applied and num_calls == 2
        assert finding.is_irreproducible and finding.sick_ranks["gradients"] == [1]
        assert "hardware is suspect: rank 1 on " in finding.verdict
        assert not finding.sick_tensors


def _rolled_back(run_json: str, folder: Path, bad: int | None) -> Any:
    """Train on five batches, or on those but the third, to which weights go back."""
    run = replace(RunConfig.from_json(run_json), output_dir=str(folder))
    grid, model, optimizer, step = build_step(run)
    way_back = WayBack(run, model, optimizer, grid)
    progress = training_checkpoint.Progress(step=0, updates=0, data={"num_skipped": 0})
    checkpoint = None
    for number in range(5):
        if bad is None and number == 2:
            continue
        metrics = step(mixed_rows(number), progress.step)
        progress.step += 1
        progress.updates += metrics.was_applied
        progress.data = {"num_skipped": number}
        progress.health = step._judge.state_dict()
        if number == 1:
            checkpoint = training_checkpoint.save(run, model, optimizer, grid, progress)
        if number == bad:
            progress = way_back(progress, checkpoint)
            step._judge.load_state_dict(progress.health)
    weights = [weight.detach().clone() for part in model.wrapped() for weight in part.parameters()]
    let_go(model)
    return progress, weights


@pytest.mark.parametrize(
    "run",
    [
        tiny_run(training={"precision": "bf16"}),
        pytest.param(run_of("shared optimizer, masters"), marks=pytest.mark.slow),
    ],
    ids=["one rank", "two"],
)
def test_a_run_that_went_back_equals_one_that_never_saw_the_rows(
    run: RunConfig, tmp_path: Path
) -> None:
    num_ranks = run.parallel.num_ranks
    back = run_on_ranks(num_ranks, _rolled_back, run.to_json(), tmp_path / "a", 2)
    never = run_on_ranks(num_ranks, _rolled_back, run.to_json(), tmp_path / "b", None)
    for (progress, weights), (expected_progress, expected) in zip(back, never, strict=True):
        assert progress.step == expected_progress.step == 4
        assert progress.data == {"num_skipped": 4}, "the data goes on behind the rows"
        assert progress.health == expected_progress.health
        assert (progress.num_roll_backs, progress.num_steps_rolled_back) == (1, 1)
        assert all(map(torch.equal, weights, expected))
