# SPDX-License-Identifier: Apache-2.0
"""Where the figures of a run go beside the console, one file per place.

They belong to training, since they write its metrics; `observe` knows the parts of a step only.
"""

from megatron_keye.config.run import RunConfig
from megatron_keye.training.sinks.json_lines import JsonLines
from megatron_keye.training.sinks.sink import Losses, Scores, Sink
from megatron_keye.training.sinks.tensorboard import TensorBoard
from megatron_keye.training.sinks.wandb import Wandb

__all__ = ["Losses", "Scores", "Sink", "open_sinks"]


def open_sinks(run: RunConfig, first_step: int) -> list[Sink]:
    """Open every sink of a run, which forgets what a lost process wrote after `first_step`.

    Args:
        run: The run, whose folder exists.
        first_step: Steps done, those of earlier processes.

    Raises:
        UserError: If Weights & Biases is asked for and cannot be reached.
    """
    sinks: list[Sink] = [TensorBoard(run, first_step), JsonLines(run, first_step)]
    if run.training.logging.wandb_project:
        sinks.append(Wandb(run))
    return sinks
