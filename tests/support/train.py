# SPDX-License-Identifier: Apache-2.0
"""Trains the tiny model for a few steps on the ranks of a test, and compares results."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.state import weight_state
from megatron_keye.config import RunConfig
from megatron_keye.config.fused_kernels import choose_fusions
from megatron_keye.data.row import PackedRow
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.observe.span import Span
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.random import seed_rank
from megatron_keye.training.chunk_encoder import PatchSource
from megatron_keye.training.health.judge import Judge
from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.saving import Saving
from megatron_keye.training.step import TrainingStep
from megatron_keye.training.step_clock import StepClock
from megatron_keye.training.stop import StopRequest
from tests.support.fused_adam import fused_adam
from tests.support.ranks import run_on_ranks
from tests.support.tiny import SyntheticPatches, mixed_rows

LOSS_TOLERANCE = 2e-5
"""Relative tolerance of losses and gradient norms after a few updates in float32."""
WEIGHT_TOLERANCE = 5e-5
"""Absolute tolerance of weights after a few updates with a learning rate of 0.01."""

Batches = Sequence[list[PackedRow]]


@dataclass(frozen=True)
class Trained:
    """Results of a run of a few steps."""

    metrics: list[StepMetrics]
    weights: dict[str, Tensor]

    def changed(self, other: "Trained") -> set[str]:
        """Return the names of the weights that are not bit-equal to the other run's."""
        return {n for n, w in self.weights.items() if not torch.equal(w, other.weights[n])}


def train(
    run: RunConfig,
    batches: Batches | None = None,
    *,
    save_to: Path | None = None,
    load_from: Path | None = None,
    weights_from: Path | None = None,
    with_fused_adam: bool = False,
) -> Trained:
    """Train on as many ranks as the run needs, and gather whole weights.

    Args:
        run: The run.
        batches: Rows of each step; two mixed steps by default, an empty list for initial weights.
        save_to: Parent folder of the checkpoint to save at the end.
        load_from: Checkpoint to start from; `batches` are the steps after it.
        weights_from: Checkpoint whose weights alone a new run starts from.
        with_fused_adam: Whether the optimizer keeps its state as fused ones do.
    """
    if batches is None:
        batches = [mixed_rows(step) for step in range(2)]
    arguments = (run.to_json(), batches, save_to, load_from, weights_from, with_fused_adam)
    results = run_on_ranks(run.parallel.num_ranks, _train_on_rank, *arguments, device=run.device)
    weights: dict[str, Tensor] = {}
    for _, shards in results:
        for key, shape, offset, shard in shards:
            whole = weights.setdefault(key, torch.full(shape, torch.nan))
            ranges = zip(offset, shard.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in ranges)] = shard
    assert not any(weight.isnan().any() for weight in weights.values()), "weights are incomplete"
    return Trained(metrics=results[0][0], weights=weights)


def assert_same_training(got: Trained, expected: Trained) -> None:
    """Compare losses, gradient norms and indexer losses relatively, every weight absolutely."""
    assert_same_metrics(got.metrics, expected.metrics)
    assert got.weights.keys() == expected.weights.keys(), "runs have different weights"
    for name, weight in expected.weights.items():
        worst = float((got.weights[name] - weight).abs().max())
        assert worst <= WEIGHT_TOLERANCE, f"{name} differs by {worst:.2e}"


def assert_same_metrics(got: list[StepMetrics], expected: list[StepMetrics]) -> None:
    """Compare all metrics that do not depend on time or on the sampled queries."""
    assert len(got) == len(expected), "runs have different numbers of steps"
    for step, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for name in ("loss", "gradient_norm", "indexer_kl", "router_load", "pictures"):
            torch.testing.assert_close(
                getattr(mine, name),
                getattr(theirs, name),
                rtol=LOSS_TOLERANCE,
                atol=1e-7,
                equal_nan=True,
                msg=lambda text, n=name, s=step: f"step {s}, {n}: {text}",
            )


def _train_on_rank(
    run_json: str,
    batches: Batches,
    save_to: Path | None,
    load_from: Path | None,
    weights_from: Path | None,
    with_fused_adam: bool,
) -> Any:
    run = RunConfig.from_json(run_json)
    if save_to is not None:
        run = replace(run, output_dir=str(save_to))
    with fused_adam() if with_fused_adam else nullcontext():
        grid, model, optimizer, step = build_step(run)
    progress = training_checkpoint.Progress(step=0, updates=0, data={})
    if weights_from is not None:
        training_checkpoint.load_weights(weights_from, run, model, optimizer, grid)
    if load_from is not None:
        progress = training_checkpoint.load(load_from, run, model, optimizer, grid)
    metrics = []
    for rows in batches:
        metrics.append(step(rows, progress.step))
        progress = replace(progress, step=progress.step + 1, updates=progress.updates + 1)
    if save_to is not None:
        training_checkpoint.save(run, model, optimizer, grid, progress)
    owned = list(owned_weights(weight_state(model, grid)))
    let_go(model)
    return metrics, owned


def train_announced(
    run: RunConfig, rows: list[PackedRow]
) -> tuple[list[list[Span]], list[list[Span]], list[tuple[float, ...]]]:
    """Train two steps on the same rows, both announced before the first, as the trainer does.

    Returns:
        The spans of the first step by rank, those of the second, and for each step its loss,
        gradient norm and number of pictures.
    """
    arguments = (run.to_json(), rows)
    ranks = run.parallel.num_ranks
    results = run_on_ranks(ranks, _train_announced_on_rank, *arguments, device=run.device)
    first, second, metrics = zip(*results, strict=True)
    return list(first), list(second), metrics[0]


def _train_announced_on_rank(run_json: str, rows: list[PackedRow]) -> Any:
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    batches = rows, list(rows)
    for batch in batches:
        step.announce(batch)
    figures, spans = [], []
    for number, batch in enumerate(batches):
        metrics = step(batch, number)
        assert step.recorder is not None, "the run records its timeline"
        spans.append(step.recorder.spans())
        figures.append((metrics.loss, metrics.gradient_norm, metrics.pictures))
    let_go(model)
    return *spans, figures


def encoded_ahead(spans: list[Span]) -> list[Span]:
    """Return the spans in which a rank encoded chunks of the next step."""
    encoded = [span for span in spans if span.name == "encode"]
    return [span for span in encoded if span.label.startswith("next step's")]


def without_work_ahead(run: RunConfig) -> RunConfig:
    """Return the run with vision ranks that do not encode the next step ahead."""
    vision = replace(run.parallel.vision, max_ahead_mebibytes=0)
    return replace(run, parallel=replace(run.parallel, vision=vision))


def build_step(
    run: RunConfig, source: PatchSource | None = None
) -> tuple[Grid, KeyeModel, JointOptimizer, TrainingStep]:
    """Build the training objects of one rank; call `let_go` at the end.

    Args:
        run: The run.
        source: Supplies the patches of pictures; by default synthetic ones.
    """
    grid = build_grid(run.parallel)
    seed_rank(run.training.seed, grid)
    device = torch.device("cpu" if run.device == "cpu" else torch.cuda.current_device())
    engine = run.training.linear_layers == "transformer_engine"
    fusions = choose_fusions(
        run.training, has_gpu=device.type == "cuda", uses_transformer_engine=engine
    )
    model = build_model(run, grid, device, uses_transformer_engine=engine, fusions=fusions)
    optimizer = JointOptimizer(run, model, grid)
    clock = StepClock()
    step = TrainingStep(
        run,
        grid,
        model,
        optimizer,
        source=source or SyntheticPatches(),
        open_source=SyntheticPatches,
        judge=Judge(run),
        stop=StopRequest(),
        saving=Saving(run, clock, lambda folder: None),
        clock=clock,
        device=device,
    )
    return grid, model, optimizer, step


def let_go(model: KeyeModel) -> None:
    """Free a model's process groups.

    Autograd hooks hold the wrapper in a reference cycle through C++, which Python cannot collect,
    so that the threads of its groups would stay.
    """
    for wrapped in model.wrapped():
        vars(wrapped).clear()


def owned_weights(state: dict[str, Any]) -> Iterator[tuple[str, Any, Any, Tensor]]:
    """Yield key, global shape, offset and data of every weight shard on this rank."""
    apply_factories(state)
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            data = tensor.data.detach().cpu().clone()[(None,) * tensor.prepend_axis_num]
            yield tensor.key, tensor.global_shape, tensor.global_offset, data
