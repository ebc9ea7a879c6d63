# SPDX-License-Identifier: Apache-2.0
"""The stages of a model as runs that follow each other: where each begins and how far it is."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.checkpoint.folders import checkpoint_folder, newest_checkpoint, step_of
from megatron_keye.checkpoint.history import read_history
from megatron_keye.checkpoint.manifest import problem_of
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.recipes import load_recipe
from megatron_keye.recipes.stages import CHAINS, STAGES

_OF_THE_WALK = {
    "name": "each stage is a run of its recipe's name",
    "training.checkpoint.weights": "use --weights for the first stage; others follow it",
    "training.checkpoint.resume": "a stage always goes on from its newest checkpoint",
}
"""Settings that are not the user's here, and why."""


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of the walk."""

    recipe: str
    """Name of its recipe, and of its run."""
    run: RunConfig
    """Its run."""
    settings: tuple[str, ...]
    """Values of --set."""
    ranks: int
    """Ranks that it is for."""
    before: "PlannedStage | None"
    """The stage whose weights it starts from; None for the first."""

    @property
    def words(self) -> list[str]:
        """Arguments of `megatron-keye train` for this stage."""
        settings = (word for setting in self.settings for word in ("--set", setting))
        return [self.recipe, "--resume", "auto", *settings]

    @property
    def last_step(self) -> int:
        """Steps after which it is done."""
        training = self.run.training
        return min(training.stop_after_step or training.steps, training.steps)

    @property
    def last_checkpoint(self) -> Path:
        """Folder of the checkpoint after the last step."""
        return checkpoint_folder(self.run, self.last_step)

    @property
    def is_done(self) -> bool:
        """Whether that checkpoint is there, and whole by the sizes of its files."""
        return not problem_of(self.last_checkpoint)

    @property
    def num_steps_saved(self) -> int:
        """Steps of its newest checkpoint; 0 without one."""
        newest = newest_checkpoint(self.run.folder)
        return step_of(newest) if newest else 0

    def check_beginning(self) -> None:
        """Check that what was saved of this stage began where the stage before has ended.

        Raises:
            UserError: When it began from other weights, which this walk would not train.
        """
        newest = newest_checkpoint(self.run.folder)
        if newest is None or self.before is None:
            return
        history = read_history(newest) or []
        began = history[-2] if len(history) > 1 else None
        name, step = self.before.recipe, self.before.last_step
        if began is None or (began["run"], began["steps"]) != (name, step):
            got = f"step {began['steps']} of {began['run']}" if began else "no earlier run"
            raise UserError(
                f"{self.run.folder}: holds a run that began from {got}, expected step {step} of "
                f"{name}; move the folder away to train this stage again"
            )


def plan_stages(options: argparse.Namespace, *, ranks: int, has_gpu: bool) -> list[PlannedStage]:
    """Return the stages that the command line asks for, in order.

    Args:
        options: Parsed by `run_stages`.
        ranks: Ranks of each stage; 0 for as many as its recipe is made for.
        has_gpu: Whether ranks have GPUs.

    Raises:
        UserError: For a setting that is unknown or the walk's own, an order of stages that is
            none, or ranks that do not fit.
    """
    for setting in options.set:
        name = setting.partition("=")[0].strip()
        if name in _OF_THE_WALK:
            raise UserError(
                f"--set: got {setting!r}, expected another setting: {_OF_THE_WALK[name]}"
            )
    names = [stage.name for stage in STAGES]
    first, last = names.index(options.first or names[0]), names.index(options.last or names[-1])
    if first > last:
        raise UserError(f"--to: got {options.last!r}, expected {options.first!r} or a later stage")
    planned: list[PlannedStage] = []
    # The stage before the first one is planned too, since the first starts from its weights.
    for recipe in CHAINS[options.model][max(0, first - 1) : last + 1]:
        settings = list(options.set)
        before = planned[-1] if planned else None
        weights = before.last_checkpoint if before else None
        if recipe == CHAINS[options.model][first] and options.weights is not None:
            before, weights = None, options.weights
        if weights is not None:
            settings.append(f"training.checkpoint.weights={weights}")
        planned.append(_planned(recipe, settings, before, ranks=ranks, has_gpu=has_gpu))
    return planned if first == 0 else planned[1:]


def _planned(
    recipe: str, settings: list[str], before: PlannedStage | None, *, ranks: int, has_gpu: bool
) -> PlannedStage:
    run = load_recipe(recipe)(num_ranks=ranks or 1, has_gpu=has_gpu).with_overrides(settings)
    needed = run.parallel.num_ranks
    if ranks not in (0, needed):
        raise UserError(
            f"--ranks: got {ranks}, expected {needed} for {recipe}: {run.parallel.describe()}; "
            "change a degree with --set, or see --print for Slurm jobs"
        )
    return PlannedStage(
        recipe=recipe, run=run, settings=tuple(settings), ranks=needed, before=before
    )
