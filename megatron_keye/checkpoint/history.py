# SPDX-License-Identifier: Apache-2.0
"""Which runs trained the weights of a checkpoint, in order, and which parts learned in each.

Every checkpoint carries the list as training_history.json, converted and exported ones too. A run
that starts from weights can so tell whether its phase makes sense after theirs. Without torch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from megatron_keye.config.parts import PARTS, Part
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Phase
from megatron_keye.errors import UserError

HISTORY = "training_history.json"


class PastRun(TypedDict):
    """One run that trained the weights."""

    run: str
    """Its name; for weights that come from elsewhere, that of their folder."""
    phase: Phase
    """Its phase."""
    steps: int
    """Steps that it did; 0 if that is not known."""
    trained: list[Part]
    """Parts that learned."""


def past_run(run: RunConfig, steps: int) -> PastRun:
    """Return the entry of a run that did so many steps."""
    training = run.training
    return PastRun(
        run=run.name, phase=training.phase, steps=steps, trained=list(training.trained_parts)
    )


def released(name: str) -> PastRun:
    """Return the entry of a released checkpoint, in which all has learned, indexers too."""
    return PastRun(run=name, phase="sparse", steps=0, trained=list(PARTS))


def text_of(history: Sequence[PastRun]) -> str:
    """Return the content of training_history.json."""
    return json.dumps(list(history), indent=2) + "\n"


def read_history(folder: Path) -> list[PastRun] | None:
    """Return the runs that trained a checkpoint's weights, the first run first.

    Args:
        folder: A native checkpoint, or a released one.

    Returns:
        The runs; None if the folder has no history.

    Raises:
        UserError: When the file is not one of ours.
    """
    file = folder / HISTORY
    if not file.is_file():
        return None
    keys = PastRun.__annotations__.keys()
    try:
        history: list[PastRun] = json.loads(file.read_text())
        is_ours = all(past.keys() == keys for past in history)
    except (ValueError, AttributeError, TypeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{file}: cannot be read, expected a list of runs with {', '.join(keys)}")
    return history
