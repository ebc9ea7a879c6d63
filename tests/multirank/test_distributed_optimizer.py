# SPDX-License-Identifier: Apache-2.0
"""A distributed optimizer trains as a replicated one, and both share their checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_keye.checkpoint.optimizer_shards import gather_whole, optimizers_of, shards_of
from megatron_keye.config import RunConfig
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import (
    Trained,
    assert_same_metrics,
    assert_same_training,
    build_step,
    let_go,
    train,
)

SHARING = {
    "data": {"data": 2},
    "data, expert": {"data": 2, "expert": 2},
    "context": {"context": 2},
    "dedicated vision": {"vision_ranks": 2},
    "shared ends": {"vision_ranks": 1, "shared_micro_batches": 1},
    "tensor, data": {"tensor": 2, "data": 2},
    "pipeline, data, expert": {"pipeline": 2, "data": 2, "expert": 2},
}

UNEVEN = tiny_model(num_layers=3)
"""Half of its weights' elements end inside of a weight."""


def unshared(run: RunConfig) -> RunConfig:
    optimizer = replace(run.training.optimizer, distributed=False)
    return replace(run, training=replace(run.training, optimizer=optimizer))


@pytest.mark.parametrize("degrees", SHARING.values(), ids=SHARING)
def test_sharing_changes_nothing_but_rounding(degrees: dict[str, int]) -> None:
    run = tiny_run(**degrees)
    assert_same_training(train(run), train(unshared(run)))


def test_sharing_masters_changes_nothing_but_rounding() -> None:
    run = tiny_run(data=2, expert=2, training={"precision": "bf16"})
    shared, alone = train(run), train(unshared(run))
    for mine, theirs in zip(shared.metrics, alone.metrics, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-3)
        assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-2)


def _kept(run_json: str) -> dict[str, Any]:
    """Return how much state this rank's optimizers keep, and for how many weights in part."""
    _, model, optimizer, step = build_step(RunConfig.from_json(run_json))
    step(mixed_rows(0), 0)
    shards = [shard for each in optimizers_of(optimizer) for shard in shards_of(each)]
    divided = [shard for shard in shards if not shard.is_whole]
    wholes = [shard for each in optimizers_of(optimizer) for shard in gather_whole(each)]
    let_go(model)
    return {
        "elements": sum(tensor.numel() for shard in shards for tensor in shard.kept.values()),
        "kinds": sorted({kind for shard in shards for kind in shard.kept}),
        "divided": len(divided),
        "gather_whole": [id(shard.weight) for shard in wholes if not _is_of(shard, shards)],
        "weights": len({id(shard.weight) for shard in wholes}),
    }


def _is_of(whole: Any, shards: list[Any]) -> bool:
    return any(shard.weight is whole.weight and shard.is_whole for shard in shards)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_replica_keeps_its_share(precision: str) -> None:
    run = tiny_run(data=2, expert=2, model=UNEVEN, training={"precision": precision})
    (alone, _), shared = (run_on_ranks(2, _kept, each.to_json()) for each in (unshared(run), run))
    kinds = ["exp_avg", "exp_avg_sq"] + ["master"] * (precision == "bf16")
    assert alone["divided"] == 0
    # Each expert is on one rank, so that only the rest is shared.
    for rank in shared:
        assert rank["kinds"] == kinds
        assert rank["elements"] < 0.75 * alone["elements"]
        assert rank["divided"] >= 1, "no weight is divided, so the test proves nothing"
    assert sum(len(rank["gather_whole"]) for rank in shared) == shared[0]["divided"]
    # Dense weights once, experts on each rank.
    num_weights = sum(rank["weights"] for rank in shared)
    assert alone["weights"] < num_weights < 2 * alone["weights"]


def _tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    held = dist_checkpointing.load_plain_tensors(checkpoint)
    return {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_does_not_depend_on_sharing(tmp_path: Path, precision: str) -> None:
    """From sharing replicas to one that keeps all, to other sharing replicas, bit for bit."""
    same: dict[str, Any] = {"model": UNEVEN, "training": {"precision": precision}}
    runs = [
        tiny_run(data=2, expert=2, **same),
        tiny_run(**same),
        tiny_run(context=2, vision_ranks=2, **same),
        unshared(tiny_run(data=2, **same)),
        tiny_run(tensor=2, data=2, expert=2, **same),
    ]
    batches = [mixed_rows(0), mixed_rows(1)]
    saved: list[Path] = []
    for number, run in enumerate(runs):
        folder = tmp_path / str(number)
        train(
            run, [] if saved else batches, save_to=folder, load_from=saved[-1] if saved else None
        )
        saved.append(folder / "tiny" / "checkpoints" / "step-00000002")
    (expected,) = run_on_ranks(1, _tensors, str(saved[0]))
    kinds = {key.split(".")[1] for key in expected if key.startswith("optimizer.")}
    assert kinds == {"exp_avg", "exp_avg_sq"} | ({"master"} if precision == "bf16" else set())
    assert any(tensor.count_nonzero() for key, tensor in expected.items() if "exp_avg" in key)
    for checkpoint in saved[1:]:
        (got,) = run_on_ranks(1, _tensors, str(checkpoint))
        assert got.keys() == expected.keys()
        assert not [key for key, tensor in expected.items() if not torch.equal(got[key], tensor)]


def test_a_resumed_run_continues_as_the_uninterrupted_one(tmp_path: Path) -> None:
    run = tiny_run(data=2, expert=2)
    steps = [mixed_rows(step) for step in range(4)]
    uninterrupted = train(run, steps)
    train(run, steps[:2], save_to=tmp_path)
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    same = train(run, steps[2:], load_from=checkpoint)
    assert not same.changed(uninterrupted)
    alone: Trained = train(tiny_run(), steps[2:], load_from=checkpoint)
    assert_same_metrics(alone.metrics, uninterrupted.metrics[2:])


def test_four_replicas_keep_a_quarter() -> None:
    run = tiny_run(data=4)
    shared = run_on_ranks(4, _kept, run.to_json())
    whole = run_on_ranks(4, _kept, unshared(run).to_json())[0]["elements"]
    assert sum(rank["elements"] for rank in shared) == whole
    # Rounded up to 128 elements a buffer and 64 a weight.
    assert max(rank["elements"] for rank in shared) < 0.3 * whole


def _learning(run_json: str) -> tuple[int, int, int]:
    """Return the elements that learn, those of gradient buffers, and those of optimizer state."""
    _, model, optimizer, step = build_step(RunConfig.from_json(run_json))
    step(mixed_rows(0), 0)
    weights = [w for module in model.wrapped() for w in module.parameters() if w.requires_grad]
    buffers = [b for m in model.wrapped() for b in m.buffers + m.expert_parallel_buffers]
    shards = [shard for each in optimizers_of(optimizer) for shard in shards_of(each)]
    let_go(model)
    return (
        sum(weight.numel() for weight in weights),
        sum(buffer.grad_data.numel() for buffer in buffers),
        sum(tensor.numel() for shard in shards for tensor in shard.kept.values()),
    )


@pytest.mark.parametrize("offload", [0.0, 1.0])
def test_frozen_weights_have_neither_gradients_nor_state(offload: float) -> None:
    run = tiny_run(training={"phase": "indexer_warmup", "precision": "bf16"})
    optimizer = replace(run.training.optimizer, offload=offload)
    run = replace(run, training=replace(run.training, optimizer=optimizer))
    ((learning, gradients, state),) = run_on_ranks(1, _learning, run.to_json())
    # Rounded up to 128 elements a buffer and 64 a weight.
    assert learning <= gradients < learning + 64 * 4 * 8
    assert state == 3 * learning


def _ranks_of_an_infinity(run_json: str) -> dict[str, list[int]]:
    """Return what is measured after one rank got an infinite gradient from its peers."""
    grid, model, optimizer, step = build_step(RunConfig.from_json(run_json))
    step(mixed_rows(0), 0)
    if grid.rank == 1:
        shards = (shard for each in optimizers_of(optimizer) for shard in shards_of(each))
        next(shards).weight.main_grad.fill_(torch.inf)  # type: ignore[attr-defined]
    zero = torch.zeros(())
    measured = optimizer.measure([zero, zero])
    let_go(model)
    return measured.sick


def test_an_infinite_gradient_on_one_replica_is_seen_by_all() -> None:
    run = tiny_run(data=2, expert=2, model=UNEVEN)
    found = run_on_ranks(2, _ranks_of_an_infinity, run.to_json())
    assert found == [{"sum of gradients": [0, 1]}] * 2
