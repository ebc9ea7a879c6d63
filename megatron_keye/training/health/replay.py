# SPDX-License-Identifier: Apache-2.0
"""Computes a bad step again from a checkpoint, and changes nothing, neither weights nor files."""

from functools import partial

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.selection import choose_checkpoint
from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.errors import UserError
from megatron_keye.model import build_model
from megatron_keye.optim.measured import Measured
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import build_grid
from megatron_keye.parallel.process import Process
from megatron_keye.parallel.random import seed_rank
from megatron_keye.training.health.bad_step import BadStep
from megatron_keye.training.health.judge import Judge
from megatron_keye.training.health.wording import not_finite
from megatron_keye.training.patch_source import open_patch_source
from megatron_keye.training.read_ahead import ReadAhead
from megatron_keye.training.saving import Saving
from megatron_keye.training.step import TrainingStep
from megatron_keye.training.step_clock import StepClock
from megatron_keye.training.stop import StopRequest


def replay(
    run: RunConfig,
    process: Process,
    bad: BadStep,
    *,
    uses_transformer_engine: bool,
    fusions: Fusions,
) -> str:
    """Compute the losses and gradients of a bad step. Collective: all ranks must call it.

    Args:
        run: The run, with `training.checkpoint.resume` naming the checkpoint to take weights from.
        process: This rank.
        bad: The step.
        uses_transformer_engine: As for the trainer.
        fusions: Likewise.

    Returns:
        What came out beside what was recorded, in a sentence.

    Raises:
        UserError: When the checkpoint or the samples do not belong to the step.
    """
    run.check_num_ranks(process.num_ranks)
    folder = choose_checkpoint(run, tidies=False)
    if folder is None:
        raise UserError(
            "--replay: got no checkpoint, expected one from before the step; name its folder with "
            "--resume"
        )
    grid = build_grid(run.parallel)
    seed_rank(run.training.seed, grid)
    loader = RowLoader(run.data, run.model, run.training.seed, epochs=run.training.epochs)
    model = build_model(
        run,
        grid,
        process.device,
        uses_transformer_engine=uses_transformer_engine,
        fusions=fusions,
    )
    optimizer = JointOptimizer(run, model, grid)
    progress = training_checkpoint.load(folder, run, model, optimizer, grid)
    loader.load_state_dict(bad.data)
    open_source = partial(open_patch_source, run, model, process.device, loader.probe_video)
    source, clock = open_source(), StepClock(process.heartbeat)
    step = TrainingStep(
        run,
        grid,
        model,
        optimizer,
        source=source,
        open_source=open_source,
        judge=Judge(run),
        stop=StopRequest(),
        saving=Saving(run, clock, lambda folder: None),
        clock=clock,
        device=process.device,
    )
    ahead = ReadAhead(run, loader, bad.step - 1, step.announce)
    try:
        ahead.start()
        rows = ahead.take().rows
        if [list(row.sample_names) for row in rows] != bad.samples:
            raise UserError(
                f"--replay: got other samples than those of step {bad.step}, expected the same; "
                "give the settings of the run (run.json in its folder)"
            )
        return describe(bad, *step.compute_only(rows), weights_step=progress.step)
    finally:
        ahead.close()
        if source is not None:
            source.close()


def describe(bad: BadStep, loss: float, measured: Measured, *, weights_step: int) -> str:
    """Return in a sentence what a bad step came out as, and what it had been.

    Args:
        bad: The step as it was recorded.
        loss: Mean language loss now.
        measured: Figures of all ranks now.
        weights_step: Steps that had changed the weights.
    """
    own = bad.step - 1
    weights = f"the weights after step {weights_step}"
    if weights_step != own:
        weights += f" (its own were those after step {own})"
    sick = not_finite(measured.sick) if measured.sick else "all numbers finite"
    return (
        f"step {bad.step} with {weights}: loss {loss:.6g} (was {bad.loss:.6g}), gradient norm "
        f"{measured.gradient_norm:.6g} (was {bad.gradient_norm:.6g}); {sick}"
    )
