# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run continues from: asked once at a start, the same on all ranks."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_keye.checkpoint.folders import is_named, named_checkpoints
from megatron_keye.checkpoint.manifest import check_sizes, check_sums
from megatron_keye.checkpoint.one_save import Failure, attempt
from megatron_keye.checkpoint.queue_job import has_saved
from megatron_keye.checkpoint.retention import remove_leftovers
from megatron_keye.config.check import check
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

_logger = logging.getLogger(__name__)


def choose_checkpoint(run: RunConfig, *, tidies: bool = True) -> Path | None:
    """Return the checkpoint that a run continues, None to start afresh. Collective.

    A job of a queue that starts again continues what it saved itself, whatever the setting says;
    if it has saved nothing, the setting decides as at its first start.

    With "auto" it is the newest whole one of the run's folder, and the log names those that were
    skipped. The ranks share the reading of checksums.

    Args:
        run: Its training.checkpoint.resume selects.
        tidies: Whether what a killed save left is removed before "auto" looks.

    Raises:
        UserError: When the setting names no whole checkpoint, or with "auto" when there are
            checkpoints and none is whole; the same on all ranks.
    """
    resume = run.training.checkpoint.resume
    if resume != "auto" and _has_saved(run):
        resume = "auto"
    if resume == "none":
        return None
    if resume != "auto":
        check(
            is_named(Path(resume)),
            "training.checkpoint.resume",
            resume,
            "the folder of a complete checkpoint (.../checkpoints/step-NNNNNNNN), 'auto' or "
            "'none'",
        )
        check_whole(Path(resume), checks_sums=run.training.checkpoint.checks_sums)
        return Path(resume)
    folder = run.folder / "checkpoints"
    problems = []
    for candidate in reversed(_candidates(folder, tidies=tidies)):
        problem = _problem(candidate, checks_sums=run.training.checkpoint.checks_sums)
        if not problem:
            return candidate
        problems.append(problem)
        if dist.get_rank() == 0:
            _logger.warning("%s is skipped: %s", candidate.name, problem)
    if problems:
        raise UserError(
            f"training.checkpoint.resume: got 'auto' and no whole checkpoint in {folder}: "
            f"{'; '.join(problems)}; repair one, or start afresh with 'none', which sets the "
            "run's folder aside"
        )
    return None


def _has_saved(run: RunConfig) -> bool:
    """Return whether the run's job saved a checkpoint before, as rank 0 sees it."""
    if not run.training.checkpoint.job:
        return False
    found = [False]
    if dist.get_rank() == 0:
        checkpoints = named_checkpoints(run.folder / "checkpoints")
        found = [has_saved(run.training.checkpoint.job, checkpoints)]
    dist.broadcast_object_list(found)
    return found[0]


def _candidates(folder: Path, *, tidies: bool) -> list[Path]:
    """Return what rank 0 sees in a folder of checkpoints."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [attempt(lambda: _tidied(folder) if tidies else named_checkpoints(folder), folder)]
    dist.broadcast_object_list(found)
    if isinstance(found[0], Failure):
        found[0].raise_it()
    return list(found[0])


def _tidied(folder: Path) -> list[Path]:
    # First, since a checkpoint that was being replaced may be the newest one.
    remove_leftovers(folder)
    return named_checkpoints(folder)


def check_whole(folder: Path, *, checks_sums: bool) -> None:
    """Raise unless a checkpoint is whole. Collective: the ranks share the reading of checksums.

    Args:
        folder: The checkpoint.
        checks_sums: Whether checksums are compared too; sizes always are.

    Raises:
        UserError: Names the file and what is wrong with it; the same on all ranks.
    """
    problem = _problem(folder, checks_sums=checks_sums)
    if problem:
        raise UserError(problem)


def _problem(folder: Path, *, checks_sums: bool) -> str:
    """Return the first thing that any rank finds wrong with a checkpoint, "" if nothing is."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    problem = ""
    try:
        files = check_sizes(folder)
        # Neighbours in the list are of like size.
        by_size = sorted(files, key=lambda name: (files[name].size_bytes, name))
        check_sums(folder, files, by_size[rank::num_ranks] if checks_sums else [])
    except UserError as error:
        problem = str(error)
    problems = [""] * num_ranks
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")
