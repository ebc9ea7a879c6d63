# SPDX-License-Identifier: Apache-2.0
"""The queue's job that a run belongs to: what it has saved itself, and whether another one runs.

A queue may start a job again at any time. What the folder holds by then may be an earlier run's.
"""

import json
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_SLURM = "slurm-"
"""Beginning of the name that launch/slurm.sbatch gives: slurm-CLUSTER-NUMBER."""
_SECONDS_TO_ANSWER = 30.0
_NOT_RUNNING = {
    *("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "COMPLETED", "FAILED"),
    *("CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    "REVOKED",
}


def has_saved(job: str, checkpoints: Iterable[Path]) -> bool:
    """Return whether a job saved one of these checkpoints, in this start or in an earlier one.

    Args:
        job: The run's training.checkpoint.job; "" has saved none.
        checkpoints: Their folders. One whose settings cannot be read is nobody's.
    """
    if not job:
        return False
    for folder in checkpoints:
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((folder / "run.json").read_text())
            if saved["training"]["checkpoint"]["job"] == job:
                return True
    return False


def is_running(job: str, *, asked_by: str) -> bool | None:
    """Return whether a job runs, as far as its queue can be asked.

    Args:
        job: The job's name.
        asked_by: This run's own job, since only the queue of its cluster is known.

    Returns:
        None if that is not known.
    """
    cluster, _, number = job.rpartition("-")
    if not job.startswith(_SLURM) or cluster != asked_by.rpartition("-")[0] or job == asked_by:
        return None
    command = ["squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        # Slurm forgets jobs minutes after their end.
        return False if "Invalid job id" in done.stderr else None
    states = set(done.stdout.split())
    return not states <= _NOT_RUNNING
