# SPDX-License-Identifier: Apache-2.0
"""One trial: break a job, look at what it left, go on, and compare with the unbroken run."""

import json
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from tools.faults.job import Job
from tools.faults.kinds import Fault, draw
from tools.faults.subject import NUM_STEPS

SECONDS_TO_END = 150.0
"""A fault must end the job by then: hang_minutes, the launcher's grace and a start in between."""
FIGURES = ("loss", "gradient_norm", "indexer_kl")
"""Metrics of a step that must be equal to the last bit."""


@dataclass
class Trial:
    """The result of one trial."""

    kind: str
    """Kind of the fault."""
    fault: str
    """The fault and its moment."""
    status: int
    """Exit status of the broken job."""
    outcome: str
    """What it did: ends, saves, finishes."""
    seconds: float
    """From its start to its end."""
    resumed_after: int
    """Steps that the job which went on did not repeat."""
    last_message: str
    """Last line that the broken job printed."""
    wrong: list[str] = field(default_factory=list)
    """Everything that must not happen, in words; empty if all is well."""


@dataclass(frozen=True)
class Unbroken:
    """What the unbroken run computed."""

    figures: dict[int, dict[str, float]]
    """Losses and norms of each step."""
    weights: dict[str, torch.Tensor]
    """Final weights."""


def train_unbroken(data: Path, folder: Path) -> Unbroken:
    """Train the subject without a fault."""
    job = Job(data, folder, folder / "tmp")
    assert job.wait(2 * SECONDS_TO_END), job.text
    assert job.process.returncode == 0, job.text
    job.close()
    return _results(folder / "subject")


def try_fault(kind: str, seed: int, data: Path, folder: Path, unbroken: Unbroken) -> Trial:
    """Break a job by one fault, resume it, and return what was found.

    Args:
        kind: A name in `kinds.KINDS`.
        seed: Decides rank, moment and size of the fault.
        data: Samples of the subject.
        folder: Where the job writes; removed at the end.
        unbroken: What it has to compute.
    """
    fault = draw(random.Random(seed), kind)
    job = Job(data, folder, folder / "tmp", fault=fault.inside)
    fault.strike(job, folder)
    wrong = [] if job.wait(SECONDS_TO_END) else [f"hangs: no end within {SECONDS_TO_END:.0f} s"]
    trial = Trial(
        kind=kind,
        fault=fault.name,
        status=job.process.returncode,
        outcome=_outcome(job),
        seconds=round(job.seconds, 1),
        resumed_after=0,
        last_message=(job.text.strip().splitlines() or [""])[-1][:300],
        wrong=wrong + _faults_of_the_end(fault, job),
    )
    saved = _saved_steps(folder)
    if trial.outcome == "saves" and job.last_step() not in saved:
        trial.wrong.append(f"lost: step {job.last_step()} was shown, but {saved} are saved")
    if kind == "damaged checkpoint":
        saved = saved[:-1]
    folder.mkdir(parents=True, exist_ok=True)  # A job that ended early has made none.
    (folder / "log.txt").write_text(job.text)
    job.close()
    _go_on(trial, data, folder, unbroken, last_saved=max(saved, default=0))
    if not trial.wrong:
        shutil.rmtree(folder)
    return trial


def _outcome(job: Job) -> str:
    if "stopped after step" in job.text:
        return "saves"
    is_done = re.search(r"^checkpoint: |is done; raise", job.text, re.MULTILINE)
    return "finishes" if job.process.returncode == 0 or is_done else "ends"


def _faults_of_the_end(fault: Fault, job: Job) -> list[str]:
    """Return what is wrong with how a job ended, in words."""
    wrong = []
    if _outcome(job) not in fault.outcomes:
        wrong.append(f"{_outcome(job)}, expected {' or '.join(fault.outcomes)}")
    if job.tracebacks() > fault.num_tracebacks:
        wrong.append(f"{job.tracebacks()} tracebacks shown")
    if not fault.is_asked_for and job.process.returncode != 0 and not job.text.strip():
        wrong.append("silent: nothing was printed")
    return wrong + [f"left over: {process}" for process in job.left_over_processes()]


def _go_on(trial: Trial, data: Path, folder: Path, unbroken: Unbroken, last_saved: int) -> None:
    """Resume after a fault, and note whether steps were lost and whether all results agree."""
    # A launcher that was killed cannot tidy up; the next start does it.
    job = Job(data, folder, folder / "tmp", "--resume", "auto")
    is_in_time = job.wait(SECONDS_TO_END)
    is_over = last_saved == NUM_STEPS and not job.first_step()
    trial.resumed_after = NUM_STEPS if is_over else job.first_step() - 1
    if not is_in_time or job.process.returncode != 0:
        trial.wrong.append(f"cannot go on: {job.text.strip()[-300:]}")
    elif trial.resumed_after != last_saved:
        trial.wrong.append(f"lost: step {last_saved} is saved, but {trial.resumed_after} resumed")
    else:
        trial.wrong += _differences(_results(folder / "subject"), unbroken)
    trial.wrong += [f"left over: {each}" for each in job.left_over_processes()]
    trial.wrong += [f"left over: {each}" for each in job.left_over_files()]
    (folder / "resumed.txt").write_text(job.text)
    job.close()


def _saved_steps(folder: Path) -> list[int]:
    checkpoints = (folder / "subject" / "checkpoints").glob("step-????????")
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints)


def _results(folder: Path) -> Unbroken:
    figures: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        if "loss" in record:
            figures[record["step"]] = {name: record[name] for name in FIGURES}
    last = NativeFolder(folder / "checkpoints" / f"step-{NUM_STEPS:08d}")
    return Unbroken(figures, {name: last.read(name, ()) for name in last.tensors})


def _differences(got: Unbroken, expected: Unbroken) -> list[str]:
    """Return which steps or weights are not equal to the last bit."""
    steps = [n for n, figures in expected.figures.items() if got.figures.get(n) != figures]
    if steps:
        return [f"damaged: figures of steps {steps} differ"]
    names = [n for n, w in expected.weights.items() if not torch.equal(got.weights[n], w)]
    return [f"damaged: {len(names)} weights differ, such as {names[0]}"] if names else []
