# SPDX-License-Identifier: Apache-2.0
"""Processes that score answers beside generation, with a limit of time for each answer.

An answer whose reward fails, or takes too long, is not scored, which is no score of 0: it would
teach that the answer was wrong.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.files import worker_origin
from megatron_keye.files.children import end_with_starter
from megatron_keye.post_training.reward import Reward, reward
from megatron_keye.rollout.request import Finish
from megatron_keye.scoring.question import Question

Key = tuple[int, int]
"""Prompt and answer."""
Score = Callable[[Question, str, Finish, PostTrainingConfig], Reward]
_START_SECONDS = 60.0
"""More time for the first answer of a process, which has to start."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Job:
    """An answer to be scored."""

    key: Key
    """Which one."""
    question: Question
    """What it answers."""
    text: str
    """What it says."""
    finish: Finish
    """How it ended."""


class RewardPool:
    """Scores answers in the order in which they come."""

    def __init__(self, settings: PostTrainingConfig, score: Score = reward) -> None:
        """Start the processes.

        Args:
            settings: Number of processes, limit of time, weights of rewards.
            score: A function at module level.
        """
        self._settings, self._score = settings, score
        self._waiting: deque[Job] = deque()
        self._scored: dict[Key, Reward | None] = {}
        self.failures: list[str] = []
        """A sentence for each answer of the last `collect` that was not scored."""
        self._workers = [_Worker(score, settings) for _ in range(settings.reward_processes)]

    def submit(self, job: Job) -> None:
        """Let an answer be scored. Returns at once."""
        self._waiting.append(job)
        self._look(0.0)

    def collect(self) -> dict[Key, Reward | None]:
        """Wait for all answers that were submitted since the last call, and return their rewards.

        Returns:
            By key; None for an answer that was not scored, of which `failures` tells.
        """
        self.failures = []
        while self._waiting or any(worker.job for worker in self._workers):
            self._look(_POLL_SECONDS)
        scored, self._scored = self._scored, {}
        return scored

    def close(self) -> None:
        """End the processes at once."""
        for worker in self._workers:
            worker.stop()

    def _look(self, seconds: float) -> None:
        """Take what is done, end what takes too long, and give out what waits."""
        busy = {worker.pipe: worker for worker in self._workers if worker.job}
        for pipe in wait(list(busy), timeout=seconds) if busy else ():
            self._take(busy[pipe])  # type: ignore[index]  # only connections are waited for
        for place, worker in enumerate(self._workers):
            if worker.job is not None and time.monotonic() > worker.deadline:
                limit = f"took more than post_training.reward_seconds = {worker.limit:g}"
                self._workers[place] = self._give_up(worker, limit)
            if self._waiting and self._workers[place].job is None:
                self._workers[place].begin(self._waiting.popleft())

    def _take(self, worker: "_Worker") -> None:
        assert worker.job is not None, "only processes at work are looked at"
        try:
            found, failure = worker.pipe.recv()
        except (EOFError, OSError):
            place = self._workers.index(worker)
            self._workers[place] = self._give_up(worker, "its process was killed")
            return
        if failure:
            self._note_failure(worker.job, failure)
        self._scored[worker.job.key] = found
        worker.job = None

    def _give_up(self, worker: "_Worker", reason: str) -> "_Worker":
        """End a process, and return one in its place."""
        assert worker.job is not None, "only processes at work are given up"
        self._note_failure(worker.job, reason)
        self._scored[worker.job.key] = None
        worker.stop()
        return _Worker(self._score, self._settings)

    def _note_failure(self, job: Job, reason: str) -> None:
        self.failures.append(f"question {job.question.id!r}, answer {job.key[1]}: {reason}")


class _Worker:
    """One process; it ends when this one ends, also when this one is killed."""

    def __init__(self, score: Score, settings: PostTrainingConfig) -> None:
        context = worker_origin.context([score.__module__])
        self.pipe, child_pipe = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child_pipe, score, settings), daemon=True
        )
        self._process.start()
        child_pipe.close()
        self.job: Job | None = None
        self.limit, self.deadline, self._is_new = settings.reward_seconds, 0.0, True

    def begin(self, job: Job) -> None:
        """Send an answer to the process, which is idle."""
        self.job = job
        self.deadline = time.monotonic() + self.limit + _START_SECONDS * self._is_new
        self._is_new = False
        self.pipe.send(job)

    def stop(self) -> None:
        """End the process at once."""
        self.pipe.close()
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, score: Score, settings: PostTrainingConfig) -> None:
    end_with_starter()
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        answer: tuple[Any, str]
        try:
            answer = score(job.question, job.text, job.finish, settings), ""
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            answer = None, f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        pipe.send(answer)
