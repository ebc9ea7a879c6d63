"""Training checkpoints on disk: complete or absent, loaded on any grid.

A checkpoint is written under another name and renamed when every rank is done, so that a killed
run never leaves one that looks complete. Format: Megatron-Core's torch_dist.
"""

import math
import random
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_keye.checkpoint.adapters import (
    check_adapters,
    holds_adapters,
    shapes_with_adapters,
)
from megatron_keye.checkpoint.continuation import check_continues
from megatron_keye.checkpoint.convert.carried_files import carry_on
from megatron_keye.checkpoint.convert.check_tensors import check_shapes
from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.folders import checkpoint_folder, is_inside, prune
from megatron_keye.checkpoint.history import HISTORY, PastRun, past_run, text_of
from megatron_keye.checkpoint.optimizer_state import (
    copy_to_masters,
    saved_optimizer,
    set_optimizer_steps,
    wanted_optimizer,
)
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
    best_step: int = 0
    """Steps that were done at the best validation."""
    best_loss: float = math.inf
    """Its loss over all sources, in an indexer warm-up its KL, in nats."""
    num_without_progress: int = 0
    """Validations since then."""


def save(
    run: RunConfig, model: KeyeModel, optimizer: JointOptimizer, grid: Grid, progress: Progress
) -> Path:
    """Write a checkpoint. Collective: all ranks must call it.

    Args:
        run: The run, saved in the checkpoint as JSON.
        model: Weights of this rank.
        optimizer: Moments and master weights of this rank.
        grid: Groups of this rank.
        progress: Progress of the run.

    Returns:
        The finished folder.
    """
    folder = checkpoint_folder(run, progress.step)
    partial = folder.with_name(folder.name + ".partial")
    if grid.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    weights = weight_state(model, grid)
    state = {
        "weights": weights,
        "optimizer": saved_optimizer(optimizer, weights),
        "random": _random_state(grid),
        "progress": {**asdict(progress), "parallel": run.parallel.describe()},
    }
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if grid.rank == 0:
        (partial / "run.json").write_text(run.to_json())
        history = [*progress.earlier, past_run(run, progress.step)]
        (partial / HISTORY).write_text(text_of(history))
        carry_on(run.folder, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        best_step = progress.best_step if run.training.validation.patience else 0
        best = checkpoint_folder(run, best_step)
        prune(folder.parent, run.training.checkpoint.keep, kept_too=best)
    dist.barrier()
    return folder


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
        UserError: When the run's settings do not allow to continue it, on all ranks.
    """
    check_continues(folder, run)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    saved = common["progress"]
    weights = weight_state(model, grid)
    wanted = wanted_optimizer(optimizer, weights)
    state: dict[str, Any] = {"weights": weights, "optimizer": wanted.state}
    targets = {name: data_of(part) for name, part in state.items()}
    keeps_random = saved["parallel"] == run.parallel.describe()
    if keeps_random:
        state["random"] = _random_state(grid)
    loaded = dist_checkpointing.load(state, str(folder))
    for name, part in targets.items():
        # A rank without trainable weights has no optimizer, and Megatron drops empty parts.
        copy_loaded(loaded.get(name, {}), part)
    wanted.copy_parts()
    set_optimizer_steps(optimizer, saved["updates"])
    if keeps_random:
        _restore_random(loaded["random"])
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
    shapes = {key: tensor.shape for key, tensor in NativeFolder(folder).tensors.items()}
    check_adapters(folder, shapes, run)
    check_shapes(shapes, shapes_with_adapters(run, shapes), where=str(folder))
    weights = weight_state(model, grid)
    targets = data_of(weights)
    if not holds_adapters(shapes):
        targets = {name: data for name, data in targets.items() if not is_adapter(name)}
    # Without the extra states of linears, which training does not read.
    wanted = {name: weights[name] for name in targets}
    loaded = dist_checkpointing.load({"weights": wanted}, str(folder))
    copy_loaded(loaded["weights"], targets)


def _random_state(grid: Grid) -> ShardedObject:
    """Return the states of this rank's generators, which differ between ranks."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", state, (grid.parallel.num_ranks,), (grid.rank,))


def _restore_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
