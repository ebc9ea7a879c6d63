# SPDX-License-Identifier: Apache-2.0
"""A model with all that trains it, on one rank."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.data.video.video_info import VideoInfo
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


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model with all that trains it, whatever it learns from."""

    grid: Grid
    model: KeyeModel
    optimizer: JointOptimizer
    patches: PatchSource | None
    """None on ranks that encode nothing."""
    open_patches: Callable[[], PatchSource | None]
    """Opens another source of the same kind."""
    health: RunHealth
    saving: Saving
    stop: StopRequest
    clock: StepClock
    step: TrainingStep

    def close(self) -> None:
        """Wait for saves that are under way, and end decoding."""
        self.saving.close()
        if self.patches is not None:
            self.patches.close()


def build_trained_model(
    run: RunConfig,
    process: Process,
    probe_video: Callable[[Path], VideoInfo],
    *,
    uses_transformer_engine: bool,
    fusions: Fusions,
) -> TrainedModel:
    """Draw the weights and build what trains them. Collective: all ranks must call it.

    Args:
        run: The run; its degrees fit the number of ranks.
        process: This rank.
        probe_video: Tells what a video file holds.
        uses_transformer_engine: Whether linear layers and experts are Transformer Engine's.
        fusions: The fused kernels that run.

    Raises:
        UserError: For degrees that do not fit the run.
    """
    stop, clock = StopRequest(), StepClock(process.heartbeat)
    grid, device = build_grid(run.parallel), process.device
    seed_rank(run.training.seed, grid)
    model = build_model(
        run, grid, device, uses_transformer_engine=uses_transformer_engine, fusions=fusions
    )
    optimizer = JointOptimizer(run, model, grid)
    log_video_decoder(run, grid, device)
    open_patches = partial(open_patch_source, run, model, device, probe_video)
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
    return TrainedModel(
        grid=grid,
        model=model,
        optimizer=optimizer,
        patches=patches,
        open_patches=open_patches,
        health=health,
        saving=saving,
        stop=stop,
        clock=clock,
        step=step,
    )
