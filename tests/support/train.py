"""Trains the tiny model for some steps on the ranks of a test, and compares what came out."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron_keye.config import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.random import seed_rank
from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.optimizer import JointOptimizer
from megatron_keye.training.step import TrainingStep
from torch import Tensor

from tests.support.ranks import run_on_ranks
from tests.support.tiny import synthetic_patches


@dataclass(frozen=True)
class Trained:
    """What a run of some steps came to."""

    metrics: list[StepMetrics]
    weights: dict[str, Tensor]


def train(run: RunConfig, batches: list[list[PackedRow]]) -> Trained:
    """Train on as many ranks as the run asks for, and put the weights together."""
    answers = run_on_ranks(run.parallel.num_ranks, _train_on_rank, run.to_json(), batches)
    weights: dict[str, Tensor] = {}
    for _, parts in answers:
        for key, shape, offset, part in parts:
            whole = weights.setdefault(key, torch.full(shape, torch.nan))
            region = tuple(
                slice(start, start + size) for start, size in zip(offset, part.shape, strict=True)
            )
            whole[region] = part
    assert not any(weight.isnan().any() for weight in weights.values()), "weights have holes"
    return Trained(metrics=answers[0][0], weights=weights)


def assert_same_training(
    got: Trained, expected: Trained, *, loss: float = 2e-5, weight: float = 2e-4
) -> None:
    """Compare losses, gradient norms and KL relatively, and every weight absolutely."""
    for mine, theirs in zip(got.metrics, expected.metrics, strict=True):
        for name in ("loss", "gradient_norm", "indexer_kl", "router_load", "indexer_recall"):
            a, b = getattr(mine, name), getattr(theirs, name)
            # Recall is sampled on each rank's own queries.
            if name != "indexer_recall":
                torch.testing.assert_close(a, b, rtol=loss, atol=1e-7, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    assert got.weights.keys() == expected.weights.keys(), "runs have different weights"
    for key, expected_weight in expected.weights.items():
        torch.testing.assert_close(
            got.weights[key], expected_weight, rtol=0, atol=weight, msg=lambda m, k=key: f"{k}: {m}"
        )


def _train_on_rank(run_json: str, batches: list[list[PackedRow]]) -> Any:
    run = RunConfig.from_json(run_json)
    grid = build_grid(run.parallel)
    seed_rank(run.training.seed, grid)
    device = torch.device("cpu")
    model = build_model(run, grid, device, uses_transformer_engine=False)
    optimizer = JointOptimizer(run, model, grid)
    step = TrainingStep(
        run, grid, model, optimizer, load_patches=synthetic_patches, device=device
    )
    metrics = [step(rows, number) for number, rows in enumerate(batches)]
    return metrics, list(_owned_weights(model, grid))


def _owned_weights(model: KeyeModel, grid: Grid) -> Any:
    """Yield key, whole shape, offset and data of every part of a weight on this rank."""
    for chunk in model.chunks:
        state = chunk.module.sharded_state_dict(metadata={"dp_cp_group": grid.decoder.dp_cp})
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                first = tensor.prepend_axis_num
                data = tensor.data.detach().clone()
                yield (
                    tensor.key,
                    tensor.global_shape,
                    tensor.global_offset,
                    data[(None,) * first],
                )
    if model.vision is not None:
        for name, parameter in model.vision.module.named_parameters():
            zeros = (0,) * parameter.dim()
            yield f"vision.{name}", parameter.shape, zeros, parameter.detach().clone()
