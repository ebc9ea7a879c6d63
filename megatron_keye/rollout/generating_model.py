# SPDX-License-Identifier: Apache-2.0
"""The model of a run that trains, as it generates: on training's grid, or on another one.

Where both grids are the same, so are the modules, and nothing is copied. Else the decoder has
modules and groups of its own. Vision is never split, so that training's modules encode for both.
"""

from dataclasses import dataclass, replace

from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.model import KeyeModel, build_decoder
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.process import Process
from megatron_keye.rollout.grid import generating_run
from megatron_keye.rollout.refit import Refit


@dataclass(frozen=True, kw_only=True)
class GeneratingModel:
    """This rank's part of a model as it generates."""

    run: RunConfig
    """The run as it generates."""
    grid: Grid
    """Groups of this rank while it does."""
    model: KeyeModel
    """Modules of this rank."""
    refit: Refit | None
    """Brings the newest weights; None where the modules are those that learn."""


def open_generating_model(
    run: RunConfig,
    process: Process,
    grid: Grid,
    model: KeyeModel,
    *,
    uses_transformer_engine: bool,
    fusions: Fusions,
) -> GeneratingModel:
    """Return the model as it generates. Collective: all ranks must call it.

    Args:
        run: The run as it trains; `rollout` says on which degrees it generates.
        process: This rank.
        grid: Its groups in training.
        model: Its modules in training, whose weights may still change.
        uses_transformer_engine: Whether linear layers are Transformer Engine's.
        fusions: The fused kernels that run.

    Raises:
        UserError: When the degrees do not fit the ranks.
    """
    generating = generating_run(run, process.num_ranks)
    if generating.parallel.decoder == run.parallel.decoder:
        return GeneratingModel(run=generating, grid=grid, model=model, refit=None)
    other = build_grid(generating.parallel)
    stages = build_decoder(
        generating,
        other,
        process.device,
        uses_transformer_engine=uses_transformer_engine,
        fusions=fusions,
        learns=False,
        draws_weights=False,
    )
    refit = Refit(
        (replace(model, vision=None), grid),
        (KeyeModel(stages=stages, vision=None), other),
        process.device,
    )
    vision = model.vision if other.vision is not None else None
    return GeneratingModel(
        run=generating,
        grid=other,
        model=KeyeModel(stages=stages, vision=vision),
        refit=refit,
    )
