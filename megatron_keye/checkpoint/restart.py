# SPDX-License-Identifier: Apache-2.0
"""A job that its queue starts again with other ranks goes on with the same global batch."""

from dataclasses import replace

from megatron_keye.checkpoint.folders import newest_checkpoint
from megatron_keye.checkpoint.saved_run import read_saved_run
from megatron_keye.config.run import RunConfig


def with_rows_of_job(run: RunConfig) -> RunConfig:
    """Return the run with the rows per step of what its job has saved, if that had other ranks.

    A recipe may choose rows by the number of its replicas, and fewer nodes would then change what
    a step learns from.

    Args:
        run: The run for the ranks that were started.

    Raises:
        UserError: When the replicas cannot share the rows equally.
    """
    if not run.training.checkpoint.job:
        return run
    checkpoint = newest_checkpoint(run.folder)
    if checkpoint is None:
        return run
    saved = read_saved_run(checkpoint)
    is_own = saved.training.checkpoint.job == run.training.checkpoint.job
    if not is_own or saved.parallel.num_ranks == run.parallel.num_ranks:
        return run
    rows = saved.training.rows_per_step
    return replace(run, training=replace(run.training, rows_per_step=rows))
