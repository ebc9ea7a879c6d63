# SPDX-License-Identifier: Apache-2.0
"""A run from start to end: resume, step, validate, save, summarise."""

import logging
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.errors import UserError
from megatron_keye.observe.timeline import write_step
from megatron_keye.parallel.process import Process
from megatron_keye.training.agreement import check_same_rows
from megatron_keye.training.early_end import (
    early_end,
    is_validation_due,
    note_validation,
    summarize_validation,
)
from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.patch_source import video_decoder
from megatron_keye.training.periodic_evaluation import (
    OpenEvaluation,
    open_periodic_evaluation,
)
from megatron_keye.training.provenance import host_names, record_start
from megatron_keye.training.read_ahead import ReadAhead, StepRows
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
from megatron_keye.training.trained_model import build_trained_model
from megatron_keye.training.validation import ValidationResult, open_validation

_logger = logging.getLogger(__name__)


class Trainer:
    """Runs the training on one rank."""

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
            UserError: For degrees, samples or a checkpoint that do not fit the run.
        """
        opened = open_run(run, process)
        self._lock = opened.lock
        self._run, self._process, self._fusions = run, process, fusions
        self.was_stopped = False
        """Whether a signal ended the run before its last step."""
        process.heartbeat.note("build")
        loader = RowLoader(run.data, run.model, run.training.seed, epochs=run.training.epochs)
        self._trained = build_trained_model(
            run,
            process,
            loader.probe_video,
            uses_transformer_engine=uses_transformer_engine,
            fusions=fusions,
        )
        self._clock, self._step = self._trained.clock, self._trained.step
        self._saving, self._health = self._trained.saving, self._trained.health
        grid, model = self._trained.grid, self._trained.model
        self._validation = open_validation(
            run,
            grid,
            model,
            padding_row=loader.padding_row(),
            device=process.device,
            heartbeat=process.heartbeat,
        )
        self._evaluation = open_periodic_evaluation(
            run, grid, model, process, self._clock, open_evaluation
        )
        self._last_validation: ValidationResult | None = None
        self._checkpoints = RunCheckpoints(run, process, opened, self._trained)
        self._sums, self._num_damaged = StepSums(), 0
        process.heartbeat.note("load")
        self._progress = self._checkpoints.load(
            Progress(step=0, updates=0, data=loader.state_dict(), earlier=opened.earlier),
            lambda progress: loader.load_state_dict(progress.data),
        )
        process.heartbeat.folder = str(run.folder)
        training = run.training
        self._has_rows = (
            not loader.is_exhausted if training.epochs else self._progress.step < training.steps
        )
        self._ahead = ReadAhead(run, loader, self._progress.step, self._step.announce)

    def train(self) -> dict[str, Any]:
        """Train to the last step, or until a signal asks to stop, saving on the way.

        Returns:
            The summary that rank 0 also writes to summary.json.
        """
        try:
            return self._train()
        finally:
            self._ahead.close()
            self._trained.close()
            self._lock.release()

    def _train(self) -> dict[str, Any]:
        if self._is_over():
            return self._already_ended()
        hosts, first_step = host_names(), self._progress.step
        self._trained.stop.listen()
        if self._process.rank != 0:
            return self._summary(self._run_steps(None))
        device = device_name(self._process.device)
        record_start(self._run, first_step, hosts, device, self._fusions)
        with Report(self._run, first_step, self._last_step(0)) as report:
            summary = self._summary(self._run_steps(report))
        write_summary(self._run, summary)
        show_summary(summary, note=self._note())
        return summary

    def _is_over(self) -> bool:
        """Return whether this process has no more steps to run."""
        stop_after = self._run.training.stop_after_step
        is_stopped = 0 < stop_after <= self._progress.step
        return not self._has_rows or is_stopped or bool(early_end(self._run, self._progress))

    def _last_step(self, num_steps: int) -> int:
        """Return the step after which this process stops if the run has `num_steps`."""
        training = self._run.training
        steps = training.steps or num_steps
        return min(training.stop_after_step or steps, steps)

    def _already_ended(self) -> dict[str, Any]:
        """Show the summary of a finished run; a job that is queued again must not fail."""
        summary = read_summary(self._run)
        setting = "steps" if self._run.training.steps else "epochs"
        done = f"step {self._progress.step} is done; raise training.{setting} to continue"
        if self._process.rank == 0:
            show_summary(summary, note=early_end(self._run, self._progress) or done)
        return summary

    def _run_steps(self, report: Report | None) -> Path | None:
        """Run the remaining steps and return the last checkpoint's folder, None without one."""
        folder = None
        self._clock.end_step()  # Building the run is no part of its first step.
        self._ahead.start()
        # Those that a signal left no time for, after the step that was saved.
        self._validate(report)
        self._evaluation.look(self._progress, report, is_last=not self._has_rows)
        while not self._is_over():
            batch = self._take_rows()
            metrics = self._train_one(batch)
            self._saving.look(report, has_failed=metrics.has_failed_save)
            if report is not None:
                report.expect(self._last_step(batch.num_steps))
                report.show(self._progress.step, metrics)
                report.show_slowness(self._progress.step, self._step.slowness)
                skipped = batch.skipped + self._step.damaged
                num_skipped = self._progress.data["num_skipped"]
                report.show_skipped(self._progress.step, num_skipped, skipped)
            if self._health.note(self._progress, metrics, batch.rows, is_last=not self._has_rows):
                self._go_back(report)
                continue
            self.was_stopped = metrics.asks_to_stop and not self._is_over()
            is_best = not self.was_stopped and self._validate(report)
            if not self.was_stopped:
                self._evaluation.look(self._progress, report, is_last=not self._has_rows)
            ends = {"is_last": self._is_over(), "was_stopped": self.was_stopped}
            if is_save_due(self._run, self._progress.step, is_best=is_best, **ends):
                folder = self._checkpoints.save(self._progress, report, **ends)
            if self.was_stopped:
                break
        self._saving.wait(report)
        return folder

    def _note(self) -> str:
        """Return why the run ended before its last step, "" if it did not."""
        if not self.was_stopped:
            return early_end(self._run, self._progress)
        signal_name = self._trained.stop.name or "a signal to another rank"
        last = self._last_step(0)  # 0 where epochs say when the run ends
        after = f"{self._progress.step} of {last}" if last else str(self._progress.step)
        return f"stopped after step {after} by {signal_name}; --resume auto continues it"

    def _take_rows(self) -> StepRows:
        """Wait for the rows of the next step, and begin to read those of the one behind it.

        Raises:
            UserError: For a sample that could not be read, once its step is due.
        """
        self._clock.heartbeat.begin_step(self._progress.step + 1)
        batch, failure = None, None
        with self._clock.part("data_wait"):
            try:
                batch = self._ahead.take()
            except UserError as error:
                failure = error
        if self._run.data.on_bad_sample == "skip":
            check_same_rows(batch.rows if batch else None, self._process.device)
        if batch is None:
            assert failure is not None, "there are either rows or an error"
            raise failure
        is_stop = self._progress.step + 1 == self._run.training.stop_after_step
        if not batch.is_last and not is_stop:
            self._ahead.start()
        return batch

    def _train_one(self, batch: StepRows) -> StepMetrics:
        number = self._progress.step
        metrics = self._step(batch.rows, number, batch.num_steps)
        if self._step.recorder is not None:
            rank, device = self._process.rank, self._process.device
            write_step(self._run.folder, number, rank, device, self._step.recorder)
        if number == 0:
            self._progress.first_loss = metrics.loss
        self._progress.step = number + 1
        self._progress.updates += metrics.was_applied
        self._progress.tokens += metrics.tokens
        self._progress.seconds += metrics.step_seconds
        self._note_damaged()
        num_skipped = batch.state["num_skipped"] + self._num_damaged
        self._progress.data = batch.state | {"num_skipped": num_skipped}
        self._has_rows = not batch.is_last
        self._sums.add(metrics)
        return metrics

    def _go_back(self, report: Report | None) -> None:
        """Go on from the newest checkpoint with the next rows."""
        self._saving.wait(report)  # Then all ranks know the same one.
        self._progress = self._health.go_back(self._progress)
        self._has_rows = self._ahead.go_back(self._progress.step)
        if report is not None:
            report.go_back(self._progress.step)

    def _validate(self, report: Report | None) -> bool:
        """Validate if that is due, and return whether it was the best so far."""
        is_last = not self._has_rows
        is_due = is_validation_due(self._run, self._progress, is_last=is_last)
        if self._validation is None or not is_due:
            return False
        with self._clock.part("validation"):
            self._last_validation = self._validation()
        if report is not None:
            report.show_validation(self._progress.step, self._last_validation.figures())
        return note_validation(self._run, self._progress, self._last_validation)

    def _note_damaged(self) -> None:
        """Count and log the samples that did not decode in the last step."""
        self._num_damaged += len(self._step.damaged)
        if self._process.rank == 0:
            for reason in self._step.damaged:
                _logger.warning("sample skipped: %s", reason)

    def _summary(self, checkpoint: Path | None) -> dict[str, Any]:
        if not self._sums.num_steps:  # The first validation ended the run.
            return read_summary(self._run)
        return {
            **summarize_steps(self._run, self._progress, self._sums),
            "device": device_name(self._process.device),
            "video_decoder": video_decoder(self._run, self._process.device),
            **summarize_validation(self._progress, self._last_validation),
            "checkpoint": str(checkpoint) if checkpoint else None,
        }
