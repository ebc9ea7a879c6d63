"""Builds the parts of a run on one rank: data, model, optimizer, and what works on them."""

from dataclasses import dataclass
from functools import partial

from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.process import Process
from megatron_keye.parallel.random import seed_rank
from megatron_keye.training.chunk_encoder import PatchSource
from megatron_keye.training.health.run_health import RunHealth
from megatron_keye.training.patch_source import log_video_decoder, open_patch_source
from megatron_keye.training.saving import Saving
from megatron_keye.training.step import TrainingStep
from megatron_keye.training.step_clock import StepClock
from megatron_keye.training.stop import StopRequest
from megatron_keye.training.validation import Validation, open_validation


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run on one rank."""

    grid: Grid
    loader: RowLoader
    model: KeyeModel
    optimizer: JointOptimizer
    patches: PatchSource | None
    """None on ranks that encode nothing."""
    health: RunHealth
    saving: Saving
    stop: StopRequest
    clock: StepClock
    step: TrainingStep
    validation: Validation | None
    """None without held-out samples."""

    def close(self) -> None:
        """Wait for saves that are under way, and end decoding."""
        self.saving.close()
        if self.patches is not None:
            self.patches.close()


def build_parts(
    run: RunConfig, process: Process, *, uses_transformer_engine: bool, fusions: Fusions
) -> Parts:
    """Build all parts; weights are drawn.

    Args:
        run: The run; its degrees fit the number of ranks.
        process: This rank.
        uses_transformer_engine: Whether linear layers are Transformer Engine's.
        fusions: The fused kernels that run.

    Raises:
        UserError: For degrees or samples that do not fit the run.
    """
    stop, clock = StopRequest(), StepClock(process.heartbeat)
    grid, device = build_grid(run.parallel), process.device
    seed_rank(run.training.seed, grid)
    loader = RowLoader(run.data, run.model, run.training.seed, epochs=run.training.epochs)
    model = build_model(
        run, grid, device, uses_transformer_engine=uses_transformer_engine, fusions=fusions
    )
    optimizer = JointOptimizer(run, model, grid)
    log_video_decoder(run, grid, device)
    open_patches = partial(open_patch_source, run, model, device, loader.probe_video)
    patches = open_patches()
    health = RunHealth(run, model, optimizer, grid)
    saving = Saving(run, clock, health.note_saved)
    step = TrainingStep(
        run,
        grid,
        model,
        optimizer,
        source=patches,
        open_source=open_patches,
        judge=health.judge,
        stop=stop,
        saving=saving,
        clock=clock,
        device=device,
    )
    validation = open_validation(
        run,
        grid,
        model,
        padding_row=loader.padding_row(),
        device=device,
        heartbeat=process.heartbeat,
    )
    return Parts(
        grid=grid,
        loader=loader,
        model=model,
        optimizer=optimizer,
        patches=patches,
        health=health,
        saving=saving,
        stop=stop,
        clock=clock,
        step=step,
        validation=validation,
    )
