# SPDX-License-Identifier: Apache-2.0
"""The progress of a run in its checkpoint, as JSON. Without torch."""

import json
from pathlib import Path
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

PROGRESS = "progress.json"


def progress_text(progress: dict[str, Any], run: RunConfig) -> str:
    """Return the content of progress.json.

    Args:
        progress: Fields of the progress, ready for JSON.
        run: The run, whose grid is kept beside it.
    """
    return json.dumps({**progress, "parallel": run.parallel.describe()}, indent=2) + "\n"


def read_progress(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the progress of a checkpoint, and the grid that saved it.

    Raises:
        UserError: When it cannot be read.
    """
    file = folder / PROGRESS
    try:
        saved: dict[str, Any] = json.loads(file.read_text())
        return saved, saved.pop("parallel")
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}), expected the progress of the run that saved this "
            "checkpoint; copy the checkpoint again, take an earlier one, or begin a run from its "
            "weights with training.checkpoint.weights"
        ) from error
