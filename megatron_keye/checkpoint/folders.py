"""The folders of a run's checkpoints: found by step, set aside, pruned. Without torch.

A checkpoint that is still being written has another suffix, so that every folder named here is
complete.
"""

import itertools
import re
import shutil
from pathlib import Path

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

_NAME = re.compile(r"step-(\d{8})")
_TRACES = ("run.json", "events", "checkpoints")
"""What a run leaves in its folder; the first of them before its first step."""


def checkpoint_folder(run: RunConfig, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run.folder / "checkpoints" / f"step-{step:08d}"


def newest_checkpoint(run: RunConfig) -> Path | None:
    """Return the newest checkpoint in the run's folder, None without one."""
    complete = _complete_checkpoints(run.folder / "checkpoints")
    return complete[-1] if complete else None


def weights_folder(folder: Path) -> Path:
    """Return the folder of a checkpoint: the one given, or the newest of a run's folder."""
    complete = _complete_checkpoints(folder / "checkpoints")
    return complete[-1] if complete else folder


def step_of(checkpoint: Path) -> int:
    """Return the steps that were done at a checkpoint."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, "a checkpoint is named by its step"
    return int(match[1])


def find_checkpoint(run: RunConfig) -> Path | None:
    """Return the checkpoint that the run's `resume` setting selects; None to start afresh.

    Raises:
        UserError: When it names a folder that is not a complete checkpoint.
    """
    resume = run.training.checkpoint.resume
    if resume == "none":
        return None
    if resume == "auto":
        return newest_checkpoint(run)
    folder = Path(resume)
    if not (folder / "metadata.json").is_file() or not _NAME.fullmatch(folder.name):
        raise UserError(
            f"training.checkpoint.resume: got {resume!r}, expected the folder of a complete "
            "checkpoint (.../checkpoints/step-NNNNNNNN), 'auto' or 'none'"
        )
    return folder


def set_aside(run: RunConfig, rank: int, *, continued: Path | None) -> None:
    """Append a number to the folder of an earlier run of this name, so that nothing is lost.

    Also that of a run that was lost before its first checkpoint: its events must not mix with
    those of this run.

    Args:
        run: The run that begins.
        rank: Rank 0 renames; the others write nothing before the next collective call.
        continued: The checkpoint that it continues, if any; in the run's own folder, nothing is
            renamed.
    """
    goes_on = continued is not None and is_inside(continued, run.folder)
    if rank != 0 or goes_on or not any((run.folder / trace).exists() for trace in _TRACES):
        return
    names = (run.folder.with_name(f"{run.name}.{number}") for number in itertools.count(1))
    run.folder.rename(next(name for name in names if not name.exists()))


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
