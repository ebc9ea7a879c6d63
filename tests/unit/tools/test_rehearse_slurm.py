# SPDX-License-Identifier: Apache-2.0
"""A rehearsal leaves the user's own runs alone."""

from pathlib import Path

from megatron_keye.cli import train
from megatron_keye.cli.arguments import chosen_run
from megatron_keye.config import RunConfig
from tools.rehearse_slurm import job_arguments


def rehearsed(*arguments: str) -> RunConfig:
    words = job_arguments("keye_tiny", arguments, Path("/temporary"))
    return chosen_run(train.parse_arguments(words), num_ranks=4, has_gpu=False)


def test_the_runs_folder_is_temporary_unless_one_is_named() -> None:
    assert rehearsed("--set", "name=mine").folder == Path("/temporary/runs/mine")
    assert rehearsed("--set", "output_dir=kept").folder == Path("kept/keye_tiny")
