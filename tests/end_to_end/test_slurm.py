# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.sbatch on a real Slurm: it stops in time, goes on, fails and is cancelled well."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools.rehearse_slurm import LocalSlurm, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm to rehearse with: {missing()}"),
]
ROOT = Path(__file__).resolve().parents[2]
JOB_SECONDS = 90.0
SECONDS_TO_END = 45.0
"""More than KillWait, after which Slurm kills what is left."""
SAVES_EACH_STEP = "training.checkpoint.interval_steps=1"
"""So that signals also meet what earlier saves left running."""
RANKS_PER_NODE = 1


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    with LocalSlurm() as running:
        yield running


class Job:
    """A job of the tiny recipe on two nodes, with its results and its log in `folder`."""

    def __init__(
        self,
        slurm: LocalSlurm,
        folder: Path,
        *settings: str,
        python_path: str = "",
        nodes: str = "2",
    ) -> None:
        self.slurm, self.folder = slurm, folder
        everything = ("training.rows_per_step=1", "device=cpu", f"output_dir={folder}", *settings)
        slurm.environment["PYTHONPATH"] = f"{python_path}:{ROOT}"
        self.number = slurm.submit(
            "keye_tiny",
            *(part for setting in everything for part in ("--set", setting)),
            ranks_per_node=RANKS_PER_NODE,
            options=(f"--output={folder}/job.log", f"--nodes={nodes}"),
        )

    def log(self) -> str:
        file = self.folder / "job.log"
        return file.read_text() if file.exists() else ""

    def until(self, is_so: Callable[[], bool], seconds: float = JOB_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"{self.slurm.job(self.number)}\n{self.log()}"
            time.sleep(0.1)

    def until_over(self, seconds: float = JOB_SECONDS) -> dict[str, str]:
        self.until(lambda: self.slurm.is_over(self.number), seconds)
        return self.slurm.job(self.number)

    def until_step(self, step: int) -> None:
        self.until(lambda: f"step {step}/" in self.log())

    def losses(self) -> list[float]:
        events = EventAccumulator(str(self.folder / "keye_tiny" / "events"))
        events.Reload()
        return [event.value for event in events.Scalars("train/loss")]

    def checkpoints(self) -> list[str]:
        return sorted(os.listdir(self.folder / "keye_tiny" / "checkpoints"))

    def processes(self) -> list[psutil.Process]:
        mine = f"output_dir={self.folder}"
        return [p for p in psutil.process_iter(["cmdline"]) if mine in (p.info["cmdline"] or ())]


def test_a_job_stops_before_its_limit_and_goes_on_as_if_unbroken(
    slurm: LocalSlurm, tmp_path: Path
) -> None:
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for folder in folders:
        folder.mkdir()
    steps = "training.steps=6"
    broken = Job(slurm, folders[1], steps, SAVES_EACH_STEP)
    broken.until_step(2)
    # What --signal=B:USR1@300 does 300 seconds before the limit.
    slurm.call("scancel", "--batch", "--signal=USR1", broken.number)
    broken.until(lambda: "the job queues again" in broken.log())
    stopped_after = int(re.findall(r"stopped after step (\d+) of 6 by", broken.log())[0])
    assert 2 <= stopped_after < 6
    assert broken.checkpoints()[-1] == f"step-{stopped_after:08d}"
    # Waits for the broken one's second part, or runs before it.
    whole = Job(slurm, folders[0], steps)
    ended = broken.until_over()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), broken.log()
    settings = json.loads((folders[1] / "keye_tiny" / "run.json").read_text())
    assert settings["training"]["checkpoint"]["job"] == f"slurm-rehearsal-{broken.number}"
    assert broken.log().count("step 1/6 ") == 1
    ended = whole.until_over()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), whole.log()
    assert len(whole.losses()) == 6
    assert broken.losses() == whole.losses()


def test_a_preempted_job_goes_on_with_fewer_nodes_and_an_early_warning_does_not_end_it(
    slurm: LocalSlurm, tmp_path: Path
) -> None:
    """Both kinds of restart in one job, since each start takes seconds."""
    job = Job(slurm, tmp_path, "training.steps=1000", nodes="1-2")
    job.until_step(1)
    urgent = ("--partition=urgent", "--nodes=2", f"--output={tmp_path}/urgent.log")
    slurm.call("sbatch", *urgent, "--wrap", "true")
    job.until(lambda: "preempted; the job queues again" in job.log())
    (stopped_after,) = map(int, re.findall(r"stopped after step (\d+) of 1000 by", job.log()))
    assert job.checkpoints() == [f"step-{stopped_after:08d}"]
    slurm.call("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    try:
        job.until(lambda: slurm.job(job.number)["Restarts"] == "1" and bool(job.processes()))
        assert slurm.job(job.number)["NumNodes"] == "1"
        # A warning while the only rank imports costs a step, not the job.
        slurm.call("scancel", "--batch", "--signal=USR1", job.number)
        job.until(lambda: "saved before the time limit; the job queues again" in job.log())
        assert f"step {stopped_after + 1}/1000 " in job.log()
        settings = json.loads((tmp_path / "keye_tiny" / "run.json").read_text())
        assert settings["parallel"]["vision"]["placement"] == "colocated"
        assert settings["training"]["rows_per_step"] == 1
    finally:
        slurm.call("scancel", "--signal=KILL", "--full", job.number)
        slurm.call("scontrol", "update", "NodeName=node2", "State=RESUME")
    job.until(lambda: not job.processes(), SECONDS_TO_END)


def test_ranks_that_do_not_fit_the_grid_end_the_job_with_a_sentence(
    slurm: LocalSlurm, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "parallel.decoder.tensor=2")
    ended = job.until_over()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), job.log()
    assert job.log().count("error: parallel: got") == 1, job.log()
    assert "expected 2, the number of ranks that were started" in job.log()
    assert "Traceback" not in job.log()


FAULT = """
import os
if os.environ.get("RANK") == "1":
    from megatron_keye.errors import UserError
    from megatron_keye.training.chunk_encoder import ChunkEncoder
    def failing(self, *arguments, **more):
        raise UserError("a deliberate fault of the second node")
    ChunkEncoder.backward = failing
"""
"""Python imports it at its start, as sitecustomize."""


def test_a_rank_that_fails_on_one_node_ends_the_job_on_both(
    slurm: LocalSlurm, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    job = Job(slurm, tmp_path, "training.steps=1000", python_path=str(tmp_path))
    job.until(lambda: "a deliberate fault" in job.log())
    ended = job.until_over(SECONDS_TO_END)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), job.log()
    assert job.log().count("error: a deliberate fault of the second node") == 1, job.log()
    assert "Traceback" not in job.log()
    assert not job.processes()


def test_a_cancelled_job_saves_and_leaves_no_process(slurm: LocalSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "training.steps=1000", SAVES_EACH_STEP)
    job.until_step(2)
    slurm.call("scancel", job.number)
    job.until(lambda: not job.processes(), SECONDS_TO_END)
    assert job.until_over(SECONDS_TO_END)["JobState"] == "CANCELLED"
    stopped_after = int(re.findall(r"stopped after step (\d+) of 1000 by", job.log())[0])
    assert job.checkpoints() == [f"step-{stopped_after - n:08d}" for n in (1, 0)]
    assert "queues again" not in job.log()
