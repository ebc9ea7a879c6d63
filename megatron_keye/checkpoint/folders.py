"""The folders of a run's checkpoints: found by step, pruned. Without torch.

A checkpoint that is still being written has another suffix, so that every folder named here is
complete.
"""

import re
import shutil
from pathlib import Path

from megatron_keye.checkpoint.queue_job import has_saved
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

_NAME = re.compile(r"step-(\d{8})")


def checkpoint_folder(run: RunConfig, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run.folder / "checkpoints" / f"step-{step:08d}"


def newest_checkpoint(run: RunConfig) -> Path | None:
    """Return the newest checkpoint in the run's folder, None without one."""
    complete = _complete_checkpoints(run.folder / "checkpoints")
    return complete[-1] if complete else None


def step_of(checkpoint: Path) -> int:
    """Return the steps that were done at a checkpoint."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, "a checkpoint is named by its step"
    return int(match[1])


def find_checkpoint(run: RunConfig) -> Path | None:
    """Return the checkpoint that the run's `resume` setting selects; None to start afresh.

    A job of a queue that starts again continues what it saved itself, whatever the setting says;
    if it has saved nothing, the setting decides as at its first start.

    Raises:
        UserError: When it names a folder that is not a complete checkpoint.
    """
    resume, job = run.training.checkpoint.resume, run.training.checkpoint.job
    if resume == "auto" or has_saved(job, _complete_checkpoints(run.folder / "checkpoints")):
        return newest_checkpoint(run)
    if resume == "none":
        return None
    folder = Path(resume)
    if not (folder / "metadata.json").is_file() or not _NAME.fullmatch(folder.name):
        raise UserError(
            f"training.checkpoint.resume: got {resume!r}, expected the folder of a complete "
            "checkpoint (.../checkpoints/step-NNNNNNNN), 'auto' or 'none'"
        )
    return folder


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


def _complete_checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def prune(folder: Path, keep: int, *, kept_too: Path) -> None:
    """Remove all but the newest checkpoints.

    Args:
        folder: Where they are.
        keep: How many stay; 0 for all.
        kept_too: One that stays whatever its age.
    """
    for old in _complete_checkpoints(folder)[:-keep] if keep else []:
        if old != kept_too:
            shutil.rmtree(old)
