"""The folders of a run's checkpoints: named by step, found, set aside. Without torch.

A checkpoint that is still being written has another suffix. What has the name of one counts only
if it is whole by its manifest.
"""

import itertools
import re
from pathlib import Path

from megatron_keye.checkpoint.manifest import problem_of
from megatron_keye.config.run import RunConfig

_NAME = re.compile(r"step-(\d{8})")
_TRACES = ("run.json", "events", "checkpoints")
"""What a run leaves in its folder; the first of them before its first step."""


def checkpoint_folder(run: RunConfig, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run.folder / "checkpoints" / f"step-{step:08d}"


def named_checkpoints(folder: Path) -> list[Path]:
    """Return what has the name of a checkpoint in a folder, whole or not, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def newest_checkpoint(run: RunConfig) -> Path | None:
    """Return the newest checkpoint in the run's folder whose files are whole, None without one."""
    named = reversed(named_checkpoints(run.folder / "checkpoints"))
    return next((folder for folder in named if not problem_of(folder)), None)


def is_named(path: Path) -> bool:
    """Return whether a path has the name of a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """Return the steps that were done at a checkpoint."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, "a checkpoint is named by its step"
    return int(match[1])


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
