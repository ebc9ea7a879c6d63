"""Trains the tiny model for some steps on the ranks of a test, and compares what came out."""

from collections.abc import Iterator, Sequence
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
from megatron_keye.data.row import PackedRow
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.observe.span import Span
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.random import seed_rank
from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.step import TrainingStep
from megatron_keye.training.stop import StopRequest
from tests.support.ranks import run_on_ranks
from tests.support.tiny import SyntheticPatches, mixed_rows

LOSS_TOLERANCE = 2e-5
"""Relative, of losses and gradient norms after a few updates in float32."""
WEIGHT_TOLERANCE = 5e-5
"""Absolute, of weights that a few updates of 0.01 have moved."""

Batches = Sequence[list[PackedRow]]


@dataclass(frozen=True)
class Trained:
    """What a run of some steps came to."""

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
) -> Trained:
    """Train on as many ranks as the run asks for, and put the weights together.

    Args:
        run: The run.
        batches: Rows of each step; two mixed steps by default, none for fresh weights.
        save_to: Folder under which a checkpoint is written at the end.
        load_from: Checkpoint to start from; `batches` then are the steps after it.
    """
    if batches is None:
        batches = [mixed_rows(step) for step in range(2)]
    arguments = (run.to_json(), batches, save_to, load_from)
    answers = run_on_ranks(run.parallel.num_ranks, _train_on_rank, *arguments, device=run.device)
    weights: dict[str, Tensor] = {}
    for _, parts in answers:
        for key, shape, offset, part in parts:
            whole = weights.setdefault(key, torch.full(shape, torch.nan))
            spans = zip(offset, part.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in spans)] = part
    assert not any(weight.isnan().any() for weight in weights.values()), "weights have holes"
    return Trained(metrics=answers[0][0], weights=weights)


def assert_same_training(got: Trained, expected: Trained) -> None:
    """Compare losses, gradient norms and indexer losses relatively, every weight absolutely."""
    assert_same_metrics(got.metrics, expected.metrics)
    assert got.weights.keys() == expected.weights.keys(), "runs have different weights"
    for name, weight in expected.weights.items():
        worst = float((got.weights[name] - weight).abs().max())
        assert worst <= WEIGHT_TOLERANCE, f"{name} differs by {worst:.2e}"


def assert_same_metrics(got: list[StepMetrics], expected: list[StepMetrics]) -> None:
    """Compare all that does not depend on time or on which queries were sampled."""
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
    run_json: str, batches: Batches, save_to: Path | None, load_from: Path | None
) -> Any:
    run = RunConfig.from_json(run_json)
    if save_to is not None:
        run = replace(run, output_dir=str(save_to))
    grid, model, optimizer, step = build_step(run)
    progress = training_checkpoint.Progress(step=0, updates=0, data={})
    if load_from is not None:
        progress = training_checkpoint.load(load_from, run, model, optimizer, grid)
    metrics = []
    for rows in batches:
        metrics.append(step(rows, progress.step))
        progress = replace(progress, step=progress.step + 1, updates=progress.updates + 1)
    if save_to is not None:
        training_checkpoint.save(run, model, optimizer, grid, progress)
    owned = list(_owned_weights(weight_state(model, grid)))
    let_go(model)
    return metrics, owned


def train_announced(
    run: RunConfig, rows: list[PackedRow]
) -> tuple[list[list[Span]], list[list[Span]], list[tuple[float, ...]]]:
    """Train two steps on the same rows, announced before the first runs, as the trainer does.

    Returns:
        The phases of the first step by rank, those of the second, and for each step its loss,
        gradient norm and number of pictures.
    """
    arguments = (run.to_json(), rows)
    ranks = run.parallel.num_ranks
    answers = run_on_ranks(ranks, _train_announced_on_rank, *arguments, device=run.device)
    first, second, figures = zip(*answers, strict=True)
    return list(first), list(second), figures[0]


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
    """Return the phases in which a rank encoded chunks of the next step."""
    own = [span for span in spans if span.name == "encode"]
    return [span for span in own if span.label.startswith("next step's")]


def without_work_ahead(run: RunConfig) -> RunConfig:
    """Return the run with vision ranks that wait for the next step."""
    vision = replace(run.parallel.vision, max_ahead_mebibytes=0)
    return replace(run, parallel=replace(run.parallel, vision=vision))


def build_step(run: RunConfig) -> tuple[Grid, KeyeModel, JointOptimizer, TrainingStep]:
    """Build what one rank trains with; call `let_go` at the end."""
    grid = build_grid(run.parallel)
    seed_rank(run.training.seed, grid)
    device = torch.device("cpu" if run.device == "cpu" else torch.cuda.current_device())
    engine = run.training.linear_layers == "transformer_engine"
    model = build_model(run, grid, device, uses_transformer_engine=engine)
    optimizer = JointOptimizer(run, model, grid)
    source, stop = SyntheticPatches(), StopRequest()
    step = TrainingStep(run, grid, model, optimizer, source=source, stop=stop, device=device)
    return grid, model, optimizer, step


def let_go(model: KeyeModel) -> None:
    """Free a model's groups.

    Autograd's hooks hold the wrapper in a cycle through C++, which no collector sees; its groups
    would keep their threads.
    """
    for wrapped in model.wrapped():
        vars(wrapped).clear()


def _owned_weights(state: dict[str, Any]) -> Iterator[tuple[str, Any, Any, Tensor]]:
    """Yield key, whole shape, offset and data of every part of a weight on this rank."""
    apply_factories(state)
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            data = tensor.data.detach().cpu().clone()[(None,) * tensor.prepend_axis_num]
            yield tensor.key, tensor.global_shape, tensor.global_offset, data
