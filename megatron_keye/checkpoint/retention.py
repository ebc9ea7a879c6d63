# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run stay on disk, and what a killed save leaves there. Without torch."""

import shutil
from pathlib import Path

from megatron_keye.checkpoint.folders import named_checkpoints, step_of
from megatron_keye.checkpoint.manifest import problem_of
from megatron_keye.config.training import CheckpointConfig
from megatron_keye.files.written_file import rename

_PARTIAL, _REPLACED = ".partial", ".replaced"


def partial_of(folder: Path) -> Path:
    """Return the folder in which a checkpoint is written before it gets its name."""
    return folder.with_name(folder.name + _PARTIAL)


def put_in_place(folder: Path) -> None:
    """Give a finished checkpoint its name. One that has the name stays until the new one has it.

    Args:
        folder: Its name; it lies in `partial_of(folder)`, synced.
    """
    replaced = folder.with_name(folder.name + _REPLACED)
    if folder.exists():
        rename(folder, replaced)
    rename(partial_of(folder), folder)
    _remove(replaced)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves left, and put back a checkpoint that one of them was replacing.

    Args:
        folder: Where a run's checkpoints are; no save may be at work there.
    """
    for replaced in folder.glob(f"*{_REPLACED}"):
        name = replaced.with_suffix("")
        if name.exists():
            _remove(replaced)
        else:
            rename(replaced, name)
    for partial in folder.glob(f"*{_PARTIAL}"):
        _remove(partial)


def prune(folder: Path, settings: CheckpointConfig, *, kept_too: Path) -> None:
    """Remove older checkpoints. Only whole ones count, and damaged ones stay for a look at them.

    Args:
        folder: Where they are.
        settings: How many of the newest stay, and which others.
        kept_too: One that stays whatever its age.
    """
    if not settings.keep:
        return
    whole = [path for path in named_checkpoints(folder) if not problem_of(path)]
    for old in whole[: -settings.keep]:
        if old != kept_too and not settings.keeps_for_good(step_of(old)):
            # Under a name that no one takes for a checkpoint, should this be cut short.
            old.rename(partial_of(old))
            _remove(partial_of(old))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
