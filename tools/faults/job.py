# SPDX-License-Identifier: Apache-2.0
"""A job that is being broken: its ranks, what it prints, and what it leaves behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from tools.faults import subject

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.02
HANG_MINUTES = 0.2
_MARK = "MEGATRON_KEYE_JOB"
_SHARED_MEMORY = Path("/dev/shm")
_CACHES = ("megatron_keye.*", "torchinductor_*")
"""A user's own, meant to stay: what was read about media, and torch's."""


class Job:
    """One start of the subject: `launch/local.sh` in a session of its own."""

    def __init__(
        self, data: Path, output: Path, temporary: Path, *arguments: str, fault: str = "{}"
    ) -> None:
        """Start it.

        Args:
            data: Folder that `subject.write_data` wrote.
            output: The run's output_dir.
            temporary: Where it puts temporary files; made if it is not there.
            arguments: More of the command line.
            fault: JSON for `subject.VARIABLE`.
        """
        self._folders = data, output, temporary
        temporary.mkdir(parents=True, exist_ok=True)
        self._mark = uuid.uuid4().hex
        self._shared_before = set(_SHARED_MEMORY.iterdir())
        settings = {
            "output_dir": output,
            "data.samples": data / "frames.train.jsonl",
            "data.tokenizer": data / "tokenizer",
            "training.hang_minutes": HANG_MINUTES,
        }
        command = ["bash", str(ROOT / "launch/local.sh"), f"{subject.__file__}:subject"]
        command += ["--ranks", str(subject.NUM_RANKS)]
        command += [
            word for name, value in settings.items() for word in ("--set", f"{name}={value}")
        ]
        variables = {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(temporary),
            subject.VARIABLE: fault,
            _MARK: self._mark,
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._started = time.monotonic()
        self.seconds = 0.0
        """From its start to its end."""
        self.process = subprocess.Popen(
            [*command, *arguments],
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_signals,
        )

    def again(self, *arguments: str) -> "Job":
        """Start another job with the same output_dir."""
        return Job(*self._folders, *arguments)

    @property
    def text(self) -> str:
        """What it has printed so far."""
        self._log.seek(0)
        return self._log.read()

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes of its ranks that run."""
        found = {}
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and process.ppid() == self.process.pid:
                    found[int(rank)] = process
        return found

    def wait_until(self, is_true: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait for a condition, and return whether it came before the job's end and in time."""
        deadline = time.monotonic() + timeout_seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if is_true():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the end, and return whether it came in time; kill everything if not."""
        try:
            self.process.wait(timeout_seconds)
            self.seconds = self.seconds or time.monotonic() - self._started
        except subprocess.TimeoutExpired:
            for process in self._processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self.process.wait()
            return False
        return True

    def last_step(self) -> int:
        """Return the last step that it has shown, 0 before the first."""
        steps = re.findall(r"^step (\d+)/", self.text, re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def first_step(self) -> int:
        """Return the first step that it has shown, 0 without one."""
        step = re.search(r"^step (\d+)/", self.text, re.MULTILINE)
        return int(step[1]) if step else 0

    def tracebacks(self) -> int:
        """Return how many tracebacks of Python and stacks of C++ it has shown."""
        return len(re.findall(r"^Traceback|^frame #\d+:|^Exception raised from", self.text, re.M))

    def left_over_processes(self, grace_seconds: float = 5.0) -> list[str]:
        """End the processes that are there after its end, and return what they are.

        Args:
            grace_seconds: They may need as long to see that the job has ended.
        """
        deadline = time.monotonic() + grace_seconds
        while self._processes() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        processes = []
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                processes.append(" ".join(process.cmdline())[:120])
                process.kill()
        return processes

    def left_over_files(self) -> list[str]:
        """Return the temporary files that are there after its end."""
        temporary = self._folders[2]
        files = {path.name for path in temporary.iterdir()}
        files -= {path.name for pattern in _CACHES for path in temporary.glob(pattern)}
        files |= {str(path) for path in set(_SHARED_MEMORY.iterdir()) - self._shared_before}
        return sorted(files)

    def close(self) -> None:
        """Remove what the job's files took."""
        self._log.close()

    def _processes(self) -> list[psutil.Process]:
        """Return every process that has this job's mark among its variables."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_mine = process.environ().get(_MARK) == self._mark
                if is_mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def _heed_signals() -> None:
    """Let a job not ignore what a shell or nohup lets this process ignore."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def send(number: int, *processes: psutil.Process | subprocess.Popen[bytes]) -> None:
    """Send a signal to processes that may have ended."""
    for process in processes:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            process.send_signal(number)


def send_to_group(number: int, job: Job) -> None:
    """Send a signal to the job's process group, as a terminal does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, signal.Signals(number))
