# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints on disk: what is in them, and how it is loaded on any grid.

Format: Megatron-Core's torch_dist.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_keye.checkpoint.adapters import (
    check_adapters,
    holds_adapters,
    shapes_with_adapters,
)
from megatron_keye.checkpoint.continuation import check_continues
from megatron_keye.checkpoint.convert.check_tensors import check_shapes
from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.folders import checkpoint_folder, is_inside
from megatron_keye.checkpoint.history import HISTORY, PastRun, past_run, text_of
from megatron_keye.checkpoint.optimizer_state import (
    copy_to_masters,
    saved_optimizer,
    set_optimizer_steps,
    wanted_optimizer,
)
from megatron_keye.checkpoint.progress import PROGRESS, progress_text, read_progress
from megatron_keye.checkpoint.random_state import random_state, restore_random
from megatron_keye.checkpoint.saved_run import RUN
from megatron_keye.checkpoint.saver import Contents, Saver
from megatron_keye.checkpoint.selection import check_whole
from megatron_keye.checkpoint.sharded_load import load_sharded
from megatron_keye.checkpoint.state import copy_loaded, data_of, weight_state
from megatron_keye.config.check import check
from megatron_keye.config.lora import is_adapter
from megatron_keye.config.run import RunConfig
from megatron_keye.model import KeyeModel
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid


@dataclass
class Progress:
    """The progress of a run, apart from its tensors."""

    step: int
    """Steps done."""
    updates: int
    """Steps that changed weights; a step with an infinite gradient does not."""
    data: dict[str, Any]
    """Position of the data."""
    first_loss: float = math.nan
    """Language loss of the very first step."""
    tokens: int = 0
    """Real tokens of all steps."""
    seconds: float = 0.0
    """Duration of all steps."""
    earlier: list[PastRun] = field(default_factory=list)
    """Runs that trained the weights which this one started from."""
    validated_step: int = 0
    """Steps that were done at the last validation."""
    evaluated_step: int = 0
    """Steps that were done when questions were asked last."""
    best_step: int = 0
    """Steps that were done at the best validation."""
    best_loss: float = math.inf
    """Its loss over all sources, in an indexer warm-up its KL, in nats."""
    num_without_progress: int = 0
    """Validations since then."""
    num_roll_backs: int = 0
    """Returns to a checkpoint after bad steps."""
    num_steps_rolled_back: int = 0
    """Steps that these returns undid, bad ones included; their rows were passed over."""
    health: dict[str, Any] = field(default_factory=dict)
    """What bad steps are told by (`BadSteps.state_dict`)."""


def begin_save(
    saver: Saver,
    run: RunConfig,
    model: KeyeModel,
    optimizer: JointOptimizer,
    grid: Grid,
    progress: Progress,
) -> None:
    """Begin to write a checkpoint. Collective: all ranks must call it.

    Args:
        saver: Writes it, beside what this rank does next if the run says so.
        run: The run, saved in the checkpoint as JSON.
        model: Weights of this rank.
        optimizer: Moments and master weights of this rank.
        grid: Groups of this rank.
        progress: Progress of the run.
    """
    saver.begin(lambda: contents(run, model, optimizer, grid, progress))


def contents(
    run: RunConfig, model: KeyeModel, optimizer: JointOptimizer, grid: Grid, progress: Progress
) -> Contents:
    """Return what a checkpoint holds. Arguments as those of `begin_save`; collective."""
    weights = weight_state(model, grid)
    best_step = progress.best_step if run.training.validation.patience else 0
    return Contents(
        step=progress.step,
        state={
            "weights": weights,
            "optimizer": saved_optimizer(optimizer, weights),
            "random": _random_object(grid, random_state()),
        },
        texts={
            RUN: run.to_json(),
            PROGRESS: progress_text(asdict(progress), run),
            HISTORY: text_of([*progress.earlier, past_run(run, progress.step)]),
        },
        best=checkpoint_folder(run, best_step),
    )


def save(
    run: RunConfig, model: KeyeModel, optimizer: JointOptimizer, grid: Grid, progress: Progress
) -> Path:
    """Write a checkpoint, wait for it and return its folder. Arguments as those of `begin_save`.

    Collective: all ranks must call it.
    """
    saver = Saver(run)
    begin_save(saver, run, model, optimizer, grid, progress)
    saver.wait()
    saver.close()
    return checkpoint_folder(run, progress.step)


def load(
    folder: Path, run: RunConfig, model: KeyeModel, optimizer: JointOptimizer, grid: Grid
) -> Progress:
    """Read a checkpoint into the model and the optimizer. Collective: all ranks must call it.

    The grid may differ from the one it was saved on; random generators then start from the run's
    seed.

    Args:
        folder: A complete checkpoint.
        run: The run that continues.
        model: Takes the weights.
        optimizer: Takes moments and master weights.
        grid: Groups of this rank.

    Returns:
        Progress of the saved run.

    Raises:
        UserError: When the run's settings do not allow to continue it, on all ranks, or a file is
            damaged or could run code.
    """
    check_continues(folder, run)
    saved, saved_grid = read_progress(folder)
    source = NativeFolder(folder, has_optimizer=True)
    weights = weight_state(model, grid)
    wanted = wanted_optimizer(optimizer, weights)
    state: dict[str, Any] = {"weights": weights, "optimizer": wanted.state}
    targets = {name: data_of(part) for name, part in state.items()}
    loaded = load_sharded(state, source)
    for name, part in targets.items():
        # A rank without trainable weights has no optimizer, and Megatron drops empty parts.
        copy_loaded(loaded.get(name, {}), part)
    wanted.copy_parts()
    set_optimizer_steps(optimizer, saved["updates"])
    if saved_grid == run.parallel.describe():
        restore_random(source.read_object(_random_object(grid, {}).unique_key))
    # What an earlier version did not save is as at the beginning.
    known = {f.name: saved[f.name] for f in fields(Progress) if f.name in saved}
    return Progress(**known)


def load_weights(
    folder: Path, run: RunConfig, model: KeyeModel, optimizer: JointOptimizer, grid: Grid
) -> None:
    """Read only the weights of a checkpoint that training or a conversion wrote.

    Collective: all ranks must call it, before the first update, so that moments begin at 0.
    Weights are rounded to the model's type where types differ. Adapters that the checkpoint lacks
    stay as they were drawn.

    Args:
        folder: A complete checkpoint, saved on any grid.
        run: The run that begins.
        model: Takes the weights.
        optimizer: Takes the rounded ones as its master weights.
        grid: Groups of this rank.

    Raises:
        UserError: When the folder is no complete checkpoint, or not one of this model, or has
            other adapters than the run, or lies in the folder of this run's name, which
            `set_aside` will rename.
    """
    check(
        not is_inside(folder, run.folder),
        "training.checkpoint.weights",
        str(folder),
        f"a checkpoint outside of {run.folder}, which is set aside when this run begins; give the "
        "run another name",
    )
    read_weights(folder, run, model, grid)
    copy_to_masters(optimizer)
    set_optimizer_steps(optimizer, 0)


def read_weights(folder: Path, run: RunConfig, model: KeyeModel, grid: Grid) -> None:
    """Read the weights of a checkpoint into a model on any grid. Collective.

    Args:
        folder: A complete checkpoint, saved on any grid.
        run: The run that the model was built for.
        model: Takes the weights.
        grid: Groups of this rank.

    Raises:
        UserError: When the folder is no complete checkpoint, or not one of this model, or has
            other adapters than the run.
    """
    check_whole(folder, checks_sums=run.training.checkpoint.checks_sums)
    source = NativeFolder(folder)
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    check_adapters(folder, shapes, run)
    check_shapes(shapes, shapes_with_adapters(run, shapes), where=str(folder))
    weights = weight_state(model, grid)
    targets = data_of(weights)
    if not holds_adapters(shapes):
        targets = {name: data for name, data in targets.items() if not is_adapter(name)}
    wanted = {name: weights[name] for name in targets}
    loaded = load_sharded({"weights": wanted}, source)
    copy_loaded(loaded.get("weights", {}), targets)


def _random_object(grid: Grid, state: dict[str, Any]) -> ShardedObject:
    """Return this rank's generators, which differ between ranks, as a part of the checkpoint."""
    return ShardedObject("random", state, (grid.parallel.num_ranks,), (grid.rank,))
