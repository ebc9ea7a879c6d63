# SPDX-License-Identifier: Apache-2.0
"""The kinds of fault: how each one is brought about, and what a user may expect of it."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.faults.job import Job, send, send_to_group
from tools.faults.subject import INTERVAL_STEPS, NUM_RANKS, NUM_STEPS

Moment = Literal["start", "step", "save"]
Outcome = Literal["ends", "saves", "finishes"]
"""What the broken job does: it fails, stops after a step that it saves, or trains to its end."""

SECONDS_TO_START = 60.0
_IMPORTS_SECONDS = 6.0


@dataclass(frozen=True)
class Fault:
    """One fault at one moment."""

    name: str
    """What happens."""
    outcomes: tuple[Outcome, ...]
    """What the job may do then."""
    strike: Callable[[Job, Path], None]
    """Brings it about in a running job, whose output_dir is given."""
    inside: str = "{}"
    """A fault that a rank has within itself, for `subject.VARIABLE`."""
    num_tracebacks: int = 0
    """How many may be shown: one of a programming error, else none."""
    is_asked_for: bool = False
    """Whether a person asked for the end, and needs no word about it."""


def draw(generator: random.Random, name: str) -> Fault:
    """Return a fault of a kind, at a moment and in a rank that the generator chooses."""
    return KINDS[name](generator)


def _wait(job: Job, output: Path, moment: Moment, generator: random.Random) -> None:
    """Wait until a random point of the moment."""
    if moment == "start":
        job.wait_until(lambda: False, generator.uniform(0, _IMPORTS_SECONDS))
    elif moment == "step":
        step = generator.randint(1, NUM_STEPS - 1)
        job.wait_until(lambda: job.last_step() >= step, SECONDS_TO_START)
        job.wait_until(lambda: False, generator.uniform(0, 0.3))
    else:
        number = generator.randint(1, NUM_STEPS // INTERVAL_STEPS)
        saved = output / "subject" / "checkpoints" / f"step-{number * INTERVAL_STEPS:08d}"
        partial = saved.with_name(f"{saved.name}.partial")
        job.wait_until(lambda: partial.exists() or saved.exists(), SECONDS_TO_START)
        job.wait_until(lambda: False, generator.uniform(0, 0.1))


def _signal_to(
    number: signal.Signals,
    target: Literal["a rank", "the launcher", "the group"],
    outcomes: tuple[Outcome, ...],
    *,
    times: int = 1,
    moments: tuple[Moment, ...] = ("start", "step", "save"),
) -> Callable[[random.Random], Fault]:
    def make(generator: random.Random) -> Fault:
        moment = generator.choice(moments)
        rank = generator.randrange(NUM_RANKS)

        def strike(job: Job, output: Path) -> None:
            _wait(job, output, moment, generator)
            for _ in range(times):
                if target == "the group":
                    send_to_group(number, job)
                elif target == "the launcher":
                    send(number, job.process)
                else:
                    send(number, *(p for r, p in job.ranks().items() if r == rank))
                job.wait_until(lambda: False, generator.uniform(0, 0.5))

        whom = f"rank {rank}" if target == "a rank" else target
        often = " twice" if times == 2 else ""
        allowed = (*outcomes, "ends") if moment == "start" else outcomes
        return Fault(
            f"{number.name}{often} to {whom} in a {moment}",
            allowed,
            strike,
            is_asked_for=target != "a rank",
        )

    return make


def _within(
    name: str, outcomes: tuple[Outcome, ...], num_tracebacks: int = 0
) -> Callable[[random.Random], Fault]:
    """Return the maker of a fault that a rank has within itself."""

    def make(generator: random.Random) -> Fault:
        rank = generator.randrange(NUM_RANKS)
        where = "step" if "save" not in name else "call"
        number = generator.randint(2, NUM_STEPS) if where == "step" else generator.randint(1, 6)
        inside = f'{{"name": "{name}", "rank": {rank}, "{where}": {number}}}'
        title = f"{name}, rank {rank}, {'step' if where == 'step' else 'write'} {number}"
        return Fault(title, outcomes, lambda job, output: None, inside, num_tracebacks)

    return make


def _stop_a_rank(generator: random.Random) -> Fault:
    moment: Moment = generator.choice(("step", "save"))
    rank = generator.randrange(NUM_RANKS)

    def strike(job: Job, output: Path) -> None:
        _wait(job, output, moment, generator)
        send(signal.SIGSTOP, *(p for r, p in job.ranks().items() if r == rank))

    return Fault(f"STOP to rank {rank} in a {moment}", ("ends",), strike)


def _stop_for_a_while(generator: random.Random) -> Fault:
    def strike(job: Job, output: Path) -> None:
        _wait(job, output, "step", generator)
        send_to_group(signal.SIGSTOP, job)
        job.wait_until(lambda: False, generator.uniform(0.5, 3))
        send_to_group(signal.SIGCONT, job)

    return Fault("STOP and CONT to the group", ("finishes",), strike)


def _remove_the_folder(generator: random.Random) -> Fault:
    """Move the checkpoints away while the job runs, and back after its end."""

    def strike(job: Job, output: Path) -> None:
        _wait(job, output, "step", generator)
        folder = output / "subject"
        folder.rename(output / "elsewhere")
        job.wait(SECONDS_TO_START)
        shutil.rmtree(folder, ignore_errors=True)
        (output / "elsewhere").rename(folder)

    return Fault("the run's folder is gone in a step", ("ends", "finishes"), strike)


def _second_job(generator: random.Random) -> Fault:
    def strike(job: Job, output: Path) -> None:
        _wait(job, output, "step", generator)
        send_to_group(signal.SIGSTOP, job)  # or it would end before the second one has started
        second = job.again("--resume", generator.choice(("auto", "none")))
        assert second.wait(SECONDS_TO_START), "the second job hangs"
        send_to_group(signal.SIGCONT, job)
        assert second.process.returncode != 0, "two jobs trained in one folder"
        assert not second.tracebacks(), second.text
        second.close()

    return Fault("a second job in the same folder", ("finishes",), strike)


def _damage(generator: random.Random) -> Fault:
    how = generator.choice(tuple(_DAMAGES))
    place = generator.random()

    def strike(job: Job, output: Path) -> None:
        assert job.wait(SECONDS_TO_START), "the unbroken job hangs"
        newest = max((output / "subject" / "checkpoints").iterdir())
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        _DAMAGES[how](files[int(place * len(files))], generator)

    return Fault(f"the newest checkpoint has a file that is {how}", ("finishes",), strike)


def _flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "changed in one bit": _flip,
    "cut in half": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, _: os.truncate(path, 0),
    "gone": lambda path, _: path.unlink(),
}

_KILL, _TERM, _INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
KINDS: dict[str, Callable[[random.Random], Fault]] = {
    # What comes after the last save of a fast job may find nobody.
    "rank killed": _signal_to(_KILL, "a rank", ("ends", "finishes")),
    "rank segfaults": _signal_to(signal.SIGSEGV, "a rank", ("ends",), moments=("step",)),
    "launcher killed": _signal_to(_KILL, "the launcher", ("ends", "finishes")),
    "TERM": _signal_to(_TERM, "the launcher", ("saves", "finishes")),
    "TERM to the group": _signal_to(_TERM, "the group", ("saves", "finishes")),
    "TERM twice": _signal_to(_TERM, "the launcher", ("saves", "finishes"), times=2),
    "INT": _signal_to(_INT, "the group", ("saves", "finishes")),
    "INT twice": _signal_to(_INT, "the group", ("saves", "finishes", "ends"), times=2),
    "HUP": _signal_to(signal.SIGHUP, "the group", ("saves", "finishes")),
    "USR1": _signal_to(signal.SIGUSR1, "the launcher", ("saves", "finishes")),
    "USR1 to the group": _signal_to(signal.SIGUSR1, "the group", ("saves", "finishes")),
    "QUIT": _signal_to(signal.SIGQUIT, "the group", ("finishes",)),
    "rank stopped": _stop_a_rank,
    "all stopped for a while": _stop_for_a_while,
    "folder gone": _remove_the_folder,
    "second job": _second_job,
    "damaged checkpoint": _damage,
    "rank killed while it writes": _within("kill in a save", ("ends", "finishes")),
    "rank killed in a step": _within("kill in a step", ("ends",)),
    "no space": _within("no space in a save", ("ends", "finishes")),
    "error in a step": _within("raise", ("ends",), num_tracebacks=1),
    "NaN in a weight": _within("NaN in a weight", ("ends",)),
    "NaN in a moment": _within("NaN in a moment", ("ends",)),
    "NaN in a gradient": _within("NaN in a gradient", ("ends", "finishes")),
}
"""Every kind by name; each makes a fault from random numbers."""
