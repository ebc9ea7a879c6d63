# SPDX-License-Identifier: Apache-2.0
"""A job that gets other ranks when it starts again keeps its global batch."""

from pathlib import Path

import pytest

from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.checkpoint.restart import with_rows_of_job
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_run

JOB = "training.checkpoint.job=slurm-a-7"


def run_of(folder: Path, replicas: int, *settings: str) -> RunConfig:
    """Return a run whose recipe takes 6 rows for each replica."""
    run = tiny_run(data=replicas, training={"rows_per_step": 6 * replicas})
    return run.with_overrides([f"output_dir={folder}", *settings])


@pytest.fixture
def saved(tmp_path: Path) -> RunConfig:
    """Return a job's run of four replicas that has saved its first step."""
    run = run_of(tmp_path, 4, JOB)
    folder = checkpoint_folder(run, 1)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.to_json())
    write_manifest(folder, {})
    return run


def test_fewer_replicas_share_the_rows_of_before(saved: RunConfig, tmp_path: Path) -> None:
    fewer = run_of(tmp_path, 2, JOB)
    assert fewer.training.rows_per_step == 12
    going_on = with_rows_of_job(fewer)
    assert going_on.training.rows_per_step == 24
    assert going_on.parallel == fewer.parallel
    assert with_rows_of_job(saved) == saved


def test_replicas_that_do_not_divide_the_rows_are_refused(
    saved: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"parallel\.decoder\.data: got 5, .* divisor of 24 rows"):
        with_rows_of_job(run_of(tmp_path, 5, JOB))


@pytest.mark.parametrize("settings", [(), ("training.checkpoint.job=slurm-a-8",)], ids=repr)
def test_a_run_of_no_job_or_another_one_is_as_its_recipe_says(
    settings: tuple[str, ...], saved: RunConfig, tmp_path: Path
) -> None:
    run = run_of(tmp_path, 2, *settings, "training.checkpoint.resume=auto")
    assert with_rows_of_job(run) == run
