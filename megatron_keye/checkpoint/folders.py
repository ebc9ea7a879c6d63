# SPDX-License-Identifier: Apache-2.0
"""The folders of a run's checkpoints: named by step, and found. Without torch.

A checkpoint that is still being written has another suffix. What has the name of one counts only
if it is whole by its manifest.
"""

import re
from pathlib import Path

from megatron_keye.checkpoint.manifest import problem_of
from megatron_keye.config.run import RunConfig

_NAME = re.compile(r"step-(\d{8})")


def checkpoint_folder(run: RunConfig, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run.folder / "checkpoints" / f"step-{step:08d}"


def named_checkpoints(folder: Path) -> list[Path]:
    """Return what has the name of a checkpoint in a folder, whole or not, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder whose files are whole, None without one."""
    named = reversed(named_checkpoints(run_folder / "checkpoints"))
    return next((folder for folder in named if not problem_of(folder)), None)


def is_named(path: Path) -> bool:
    """Return whether a path has the name of a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def weights_folder(folder: Path) -> Path:
    """Return the folder of a checkpoint: the one given, or the newest of a run's folder."""
    return newest_checkpoint(folder) or folder


def step_of(checkpoint: Path) -> int:
    """Return the steps that were done at a checkpoint."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, "a checkpoint is named by its step"
    return int(match[1])


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())
