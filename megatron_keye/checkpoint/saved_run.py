# SPDX-License-Identifier: Apache-2.0
"""The settings of the run that saved a checkpoint: its run.json. Without torch."""

from pathlib import Path

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

RUN = "run.json"


def read_saved_run(folder: Path) -> RunConfig:
    """Return the run that saved a checkpoint.

    Args:
        folder: A native checkpoint, of training or of a conversion.

    Raises:
        UserError: When run.json is not there, damaged, or has settings that are unknown.
    """
    file = folder / RUN
    try:
        return RunConfig.from_json(file.read_text())
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}), expected the settings of the run that saved this "
            "checkpoint, with the sizes of its model; copy the checkpoint again with all its files"
        ) from error
