# SPDX-License-Identifier: Apache-2.0
"""Sets aside what another run left where this one will write, so that nothing is lost or mixed."""

import itertools
import logging
import shutil
from pathlib import Path

from megatron_keye.checkpoint.folders import is_inside, step_of
from megatron_keye.checkpoint.run_lock import RunLock
from megatron_keye.config.run import RunConfig

_TRACES = ("run.json", "events", "checkpoints")
"""What a run leaves in its folder; the first of them before its first step."""
_BY_STEP = ("checkpoints", "exports")
"""Folders with one folder a step."""

_logger = logging.getLogger(__name__)


def set_aside(run: RunConfig, lock: RunLock, *, continued: Path | None) -> None:
    """Append a number to what an earlier run, or later steps of this one, left. For rank 0.

    A run that begins gets a new folder; the old one's events would mix with its own, even those of
    a run that was lost before its first checkpoint. A run that continues a step of its own moves
    later steps from checkpoints/ to checkpoints.1/: pruning would take them for newer than what it
    saves itself, and the next start would continue them.

    Args:
        run: The run; other ranks write nothing there before the next collective call.
        lock: The lock of its folder, which is held.
        continued: The checkpoint that it continues, if any.

    Raises:
        UserError: When another run has begun in the folder at this very moment.
    """
    if continued is not None and is_inside(continued, run.folder):
        _set_later_steps_aside(run, continued)
    elif any((run.folder / trace).exists() for trace in _TRACES):
        aside = _numbered(run.folder)
        run.folder.rename(aside)
        lock.take_again(aside)


def _set_later_steps_aside(run: RunConfig, continued: Path) -> None:
    later = [path for kind in _BY_STEP for path in _later(run.folder / kind, continued)]
    if not later:
        return
    number = _numbered(run.folder / "checkpoints").suffix
    for path in later:
        aside = path.parent.with_name(path.parent.name + number)
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)
        _logger.warning("%s: is now %s, since an earlier step continues", path, aside / path.name)
    metrics = run.folder / "metrics.jsonl"
    if metrics.is_file():
        # The run's own file goes on from the step that continues.
        folder = run.folder / f"checkpoints{number}"
        folder.mkdir(exist_ok=True)
        shutil.copy2(metrics, folder / metrics.name)


def _later(folder: Path, continued: Path) -> list[Path]:
    """Return the steps in a folder that do not lead to the one that continues."""
    checkpoints = folder.with_name("checkpoints").resolve()
    is_among_them = continued.resolve().parent == checkpoints
    last = step_of(continued) if is_among_them else -1
    return [path for path in sorted(folder.glob("step-" + "[0-9]" * 8)) if step_of(path) > last]


def _numbered(path: Path) -> Path:
    """Return the first name of PATH.1, PATH.2, ... that is free."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
