# SPDX-License-Identifier: Apache-2.0
"""A run that learns from its own answers: generate, score, learn, take the new weights, save."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.parallel.process import Process
from megatron_keye.post_training.check_run import check_run
from megatron_keye.post_training.figures import (
    as_one_step,
    check_figures,
    describe_figures,
    policy_figures,
)
from megatron_keye.post_training.learning import Learned
from megatron_keye.post_training.parts import Parts
from megatron_keye.post_training.position import Position
from megatron_keye.post_training.rollout_log import RolloutLog
from megatron_keye.post_training.rollouts import GenerationStopped, Rollout
from megatron_keye.training.patch_source import video_decoder
from megatron_keye.training.periodic_evaluation import (
    OpenEvaluation,
    open_periodic_evaluation,
)
from megatron_keye.training.provenance import host_names, record_start
from megatron_keye.training.report import Report
from megatron_keye.training.run_checkpoints import RunCheckpoints, is_save_due, open_run
from megatron_keye.training.step_sums import StepSums
from megatron_keye.training.summary import (
    read_summary,
    show_summary,
    summarize_steps,
    write_summary,
)
from megatron_keye.training.throughput import device_name

_logger = logging.getLogger(__name__)


class PolicyTrainer:
    """Runs training on a model's own answers on one rank."""

    def __init__(
        self,
        run: RunConfig,
        process: Process,
        *,
        uses_transformer_engine: bool,
        fusions: Fusions = PLAIN,
        open_evaluation: OpenEvaluation | None = None,
    ) -> None:
        """Build all parts, and load the checkpoint that the run's settings ask for, if any.

        Args:
            run: The run; its degrees must fit the number of ranks.
            process: This rank.
            uses_transformer_engine: Whether linear layers are Transformer Engine's.
            fusions: The fused kernels that run.
            open_evaluation: Builds what answers the questions of training.evaluation, if any.

        Raises:
            UserError: For settings, questions or a checkpoint that do not fit the run.
        """
        check_run(run)
        opened = open_run(run, process)
        self._lock = opened.lock
        self._run, self._process, self._fusions = run, process, fusions
        process.heartbeat.note("build")
        self.was_stopped = False
        """Whether a signal ended the run before its last step."""
        self._parts = Parts(
            run, process, uses_transformer_engine=uses_transformer_engine, fusions=fusions
        )
        trained = self._parts.trained
        self._stop, self._clock = trained.stop, trained.clock
        self._saving, self._health = trained.saving, trained.health
        self._evaluation = open_periodic_evaluation(
            run, trained.grid, trained.model, process, self._clock, open_evaluation
        )
        self._checkpoints = RunCheckpoints(run, process, opened, trained)
        self._position = Position()
        self._sums = StepSums()
        self._seconds: dict[str, float] = {}
        process.heartbeat.note("load")
        data = self._position.state_dict(self._parts.prompts)
        self._progress = self._checkpoints.load(
            Progress(step=0, updates=0, data=data, earlier=opened.earlier), self._restore
        )
        self._parts.engine.take_weights(self._progress.step)
        process.heartbeat.folder = str(run.folder)

    def train(self) -> dict[str, Any]:
        """Train to the last step, or until a signal asks to stop, saving on the way.

        Returns:
            The summary that rank 0 also writes to summary.json.
        """
        try:
            return self._train()
        finally:
            self._parts.close()
            self._lock.release()

    def _train(self) -> dict[str, Any]:
        step, rank = self._progress.step, self._process.rank
        if step >= self._last_step:
            summary = read_summary(self._run)
            if rank == 0:
                show_summary(summary, note=f"step {step} is done; raise training.steps")
            return summary
        hosts = host_names()
        self._stop.listen()
        if rank != 0:
            return self._summary(self._run_steps(None, None))
        record_start(self._run, step, hosts, device_name(self._process.device), self._fusions)
        with Report(self._run, step, self._last_step) as report:
            log = RolloutLog(self._run.folder, step)
            summary = self._summary(self._run_steps(report, log))
        write_summary(self._run, summary)
        show_summary(summary, note=self._note())
        return summary

    @property
    def _last_step(self) -> int:
        """The step after which this process stops."""
        training = self._run.training
        return min(training.stop_after_step or training.steps, training.steps)

    def _run_steps(self, report: Report | None, log: RolloutLog | None) -> Path | None:
        """Run the remaining steps and return the last checkpoint's folder, None without one."""
        folder = None
        self._clock.end_step()  # Building the run is no part of its first step.
        self._evaluate(report)  # One that a signal left no time for.
        while self._progress.step < self._last_step and not self.was_stopped:
            self._clock.heartbeat.begin_step(self._progress.step + 1)
            try:
                with self._part("generate"):
                    rollout = self._parts.rollouts(
                        self._position.next_prompt, self._position.begun
                    )
            except GenerationStopped as stopped:
                self._position.begun = stopped.begun
                self.was_stopped = True
            else:
                self._learn(rollout, report, log)
            if not self.was_stopped:
                self._evaluate(report)
            self._progress.data = self._position.state_dict(self._parts.prompts)
            step = self._progress.step
            ends = {"is_last": step >= self._last_step, "was_stopped": self.was_stopped}
            if is_save_due(self._run, step, **ends):
                folder = self._checkpoints.save(self._progress, report, **ends)
        self._saving.wait(report)
        return folder

    def _evaluate(self, report: Report | None) -> None:
        """Ask the questions of training.evaluation if that is due."""
        is_last = self._progress.step >= self._run.training.steps
        self._evaluation.look(self._progress, report, is_last=is_last)

    def _learn(self, rollout: Rollout, report: Report | None, log: RolloutLog | None) -> None:
        """Learn from the answers of a step, and note it."""
        self._seconds["score"] = rollout.score_seconds
        for name, seconds in self._parts.engine.take_seconds().items():
            self._seconds[f"generate_{name}"] = seconds
        drops_equal = self._run.post_training.drops_equal_groups
        kept = rollout.kept(drops_equal=drops_equal)
        # Activations and optimizer need the memory in which the answers' keys were.
        self._parts.engine.sleep()
        with self._part("learn"):
            learned = self._parts.learning(kept, self._progress.step)
        self._progress.step += 1
        self._position.begun = {}
        self._position.next_prompt += rollout.num_prompts
        self._parts.engine.take_weights(self._progress.step)
        self._note_updates(learned, report)
        figures = policy_figures(rollout, learned, self._seconds, self._run)
        figures |= self._parts.refit_figures()
        if report is not None:
            report.show_figures(self._progress.step, figures, describe_figures(figures))
        if log is not None:
            for failure in rollout.failures:
                _logger.warning("an answer was not scored: %s", failure)
            log.write(self._progress.step, rollout, learned, kept)
        check_figures(figures, rollout, self._run)

    def _note_updates(self, learned: Learned, report: Report | None) -> None:
        """Note the updates of a step in progress and health; a step may have none."""
        limit, progress = self._run.training.health.max_bad_steps, self._progress
        self._position.num_idle = 0 if learned.metrics else self._position.num_idle + 1
        if self._position.num_idle >= limit:
            raise UserError(
                f"post_training: {limit} steps in a row had no answers to learn from, expected "
                "some whose rewards differ; rollouts/ of the run's folder has them, megatron-keye "
                "show_rollouts shows the best and the worst"
            )
        for metrics, rows in zip(learned.metrics, learned.rows, strict=True):
            progress.updates += metrics.was_applied
            self._health.note(progress, metrics, rows, is_last=False)
        if not learned.metrics:
            return
        metrics = as_one_step(learned.metrics)
        if not self._sums.num_steps and progress.step == 1:
            progress.first_loss = metrics.loss
        progress.tokens += metrics.tokens
        progress.seconds += metrics.step_seconds
        self._sums.add(metrics)
        self._saving.look(report, has_failed=metrics.has_failed_save)
        self.was_stopped = metrics.asks_to_stop and progress.step < self._last_step
        if report is not None:
            report.show(progress.step, metrics)

    def _restore(self, progress: Progress) -> None:
        self._position = Position.of(progress.data, self._parts.prompts, self._run)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Measure a part of a step."""
        began = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - began

    def _note(self) -> str:
        """Return why the run ended before its last step, "" if it did not."""
        if not self.was_stopped:
            return ""
        signal_name = self._stop.name or "a signal to another rank"
        after = f"{self._progress.step} of {self._last_step}"
        begun = ", with the answers so far" if self._position.begun else ""
        return f"stopped after step {after} by {signal_name}{begun}; --resume auto continues it"

    def _summary(self, checkpoint: Path | None) -> dict[str, Any]:
        if not self._sums.num_steps:
            return read_summary(self._run)
        return {
            **summarize_steps(self._run, self._progress, self._sums),
            "device": device_name(self._process.device),
            "video_decoder": video_decoder(self._run, self._process.device),
            "checkpoint": str(checkpoint) if checkpoint else None,
        }
