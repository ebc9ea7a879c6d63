"""A run from start to end: build, resume, step, save, summarise."""

import logging
from pathlib import Path
from typing import Any, Literal

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.config.backends import decode_backend
from megatron_keye.config.run import RunConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.row import PackedRow
from megatron_keye.data.video.decode_service import DecodeService
from megatron_keye.data.video.frame_decoder import make_decoder
from megatron_keye.errors import UserError
from megatron_keye.model import build_model
from megatron_keye.observe.timeline import write_step
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import build_grid
from megatron_keye.parallel.process import Process
from megatron_keye.parallel.random import seed_rank
from megatron_keye.training import hand_over
from megatron_keye.training.agreement import check_same_rows
from megatron_keye.training.cached_features import CachedFeatures
from megatron_keye.training.chunk_encoder import PatchSource
from megatron_keye.training.metrics import StepMetrics
from megatron_keye.training.provenance import host_names, record_start
from megatron_keye.training.report import Report
from megatron_keye.training.skipped_steps import SkippedSteps
from megatron_keye.training.step import TrainingStep
from megatron_keye.training.stop import StopRequest, hidden_from_children
from megatron_keye.training.summary import measure, read_summary, show_summary, write_summary
from megatron_keye.training.throughput import device_name

_Rows = tuple[list[PackedRow], dict[str, int | str]]
"""Rows of a step, and the loader's state after them."""

_logger = logging.getLogger(__name__)


class Trainer:
    """Runs the training on one rank."""

    def __init__(self, run: RunConfig, process: Process, *, uses_transformer_engine: bool) -> None:
        """Build all parts, and load the checkpoint that the run's settings ask for, if any.

        Args:
            run: The run; its degrees must fit the number of ranks.
            process: This rank.
            uses_transformer_engine: Whether linear layers and experts are Transformer Engine's.

        Raises:
            UserError: For degrees, samples or a checkpoint that do not fit the run.
        """
        run.check_num_ranks(process.num_ranks)
        earlier = hand_over.begin(run, process.rank)
        self._run, self._process, self._stop = run, process, StopRequest()
        self.was_stopped = False
        """Whether a signal ended the run before its last step."""
        self._grid = build_grid(run.parallel)
        seed_rank(run.training.seed, self._grid)
        self._loader = RowLoader(run.data, run.model, run.training.seed)
        self._model = build_model(
            run,
            self._grid,
            process.device,
            uses_transformer_engine=uses_transformer_engine,
        )
        self._optimizer = JointOptimizer(run, self._model, self._grid)
        self._decode_service = self._start_decoding() if self._model.vision else None
        self._step = TrainingStep(
            run,
            self._grid,
            self._model,
            self._optimizer,
            source=self._source(),
            stop=self._stop,
            device=process.device,
        )
        self._progress = training_checkpoint.Progress(
            step=0, updates=0, data=self._loader.state_dict(), earlier=earlier
        )
        self._metrics: list[StepMetrics] = []
        self._media: set[str] = set()
        self._upcoming: _Rows | UserError | None = None
        self._num_damaged = 0
        self._skipped_steps = SkippedSteps(run)
        self._resume()

    def train(self) -> dict[str, Any]:
        """Train to the last step, or until a signal asks to stop, saving on the way.

        Returns:
            The summary that rank 0 also writes to summary.json.
        """
        try:
            return self._train()
        finally:
            if self._decode_service is not None:
                self._decode_service.close()

    def _train(self) -> dict[str, Any]:
        training = self._run.training
        last = min(training.stop_after_step or training.steps, training.steps)
        if self._progress.step >= last:
            return self._already_ended(last)
        hosts, first_step = host_names(), self._progress.step
        self._stop.listen()
        if self._process.rank != 0:
            return self._summary(self._train_to(last, None))
        record_start(self._run, first_step, hosts, device_name(self._process.device))
        with Report(self._run, first_step, last) as report:
            summary = self._summary(self._train_to(last, report))
        write_summary(self._run, summary)
        show_summary(summary, note=self._note_of_stop(last))
        return summary

    def _start_decoding(self) -> DecodeService:
        """Return the service that decodes pictures for this rank's encoder."""
        decode, device = self._run.data.decode, self._process.device
        backend = self._decode_backend()
        if self._process.rank == self._grid.vision_ranks[0]:
            _logger.info(
                "decoding video with %s (data.decode.backend=%s)", backend, decode.backend
            )
        decoder = make_decoder(backend, device, decode.num_threads)
        skips_bad = self._run.data.on_bad_sample == "skip"
        return DecodeService(decoder, self._run.model.vision, decode, skips_bad=skips_bad)

    def _source(self) -> PatchSource | None:
        """Return the source of the encoder's input; None on a rank that does not encode."""
        vision, decoding = self._model.vision, self._decode_service
        if vision is None or decoding is None or not self._run.data.feature_cache:
            return decoding
        return CachedFeatures(
            self._run,
            vision.module.encoder,
            decoding,
            decoder_name=self._decode_backend(),
            device=self._process.device,
        )

    def _decode_backend(self) -> Literal["pyav", "dali"]:
        """Return the video decoder of the ranks that encode."""
        wanted, has_gpu = self._run.data.decode.backend, self._process.device.type == "cuda"
        return decode_backend(wanted, has_gpu=has_gpu)

    def _already_ended(self, last: int) -> dict[str, Any]:
        """Show the summary of a finished run; a job that is queued again must not fail."""
        summary = read_summary(self._run)
        if self._process.rank == 0:
            show_summary(summary, note=f"step {last} is done; raise training.steps to continue")
        return summary

    def _train_to(self, last: int, report: Report | None) -> Path | None:
        """Run the remaining steps and return the last checkpoint's folder, None without one."""
        folder = None
        for number in range(self._progress.step, last):
            metrics = self._train_one(number, is_last=number + 1 == last)
            skipped = self._loader.take_skipped() + self._step.damaged
            if report is not None:
                report.show(number + 1, metrics)
                report.show_skipped(number + 1, self._num_skipped(), skipped)
            is_last = number + 1 == last
            self._skipped_steps.note(number + 1, metrics)
            if is_last:
                self._skipped_steps.check_learned(self._progress.updates, metrics)
            settings = self._run.training.checkpoint
            is_due = settings.interval_steps and (number + 1) % settings.interval_steps == 0
            self.was_stopped = metrics.asks_to_stop and not is_last
            if is_due or self.was_stopped or (is_last and settings.saves_last):
                folder = self._save()
            if self.was_stopped:
                break
        return folder

    def _note_of_stop(self, last: int) -> str:
        if not self.was_stopped:
            return ""
        step, signal_name = self._progress.step, self._stop.name or "a signal to another rank"
        return f"stopped after step {step} of {last} by {signal_name}; --resume auto continues it"

    def _train_one(self, number: int, *, is_last: bool) -> StepMetrics:
        rows, state = self._take_rows()
        # Decoding works on the next step while this one runs.
        self._upcoming = None if is_last else self._fetch()
        self._media |= {picture.medium.path for row in rows for picture in row.pictures}
        metrics = self._step(rows, number)
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
        num_skipped = int(state["num_skipped"]) + self._num_damaged
        self._progress.data = state | {"num_skipped": num_skipped}
        self._metrics.append(metrics)
        return metrics

    def _take_rows(self) -> _Rows:
        """Return the rows of the next step.

        Raises:
            UserError: For a sample that could not be read, once its step is due.
        """
        fetched = self._upcoming or self._fetch()
        if isinstance(fetched, UserError):
            raise fetched
        return fetched

    def _fetch(self) -> _Rows | UserError:
        """Read the rows of one more step, and announce their pictures for decoding.

        Returns:
            The error of an unreadable sample instead, since the step before it can still run.
        """
        rows, failure = None, None
        try:
            rows = self._loader.next_rows(self._run.training.rows_per_step)
        except UserError as error:
            failure = error
        if self._run.data.on_bad_sample == "skip":
            check_same_rows(rows, self._process.device)
        if rows is None:
            assert failure is not None, "there are either rows or an error"
            return failure
        self._step.announce(rows)
        return rows, self._loader.state_dict()

    def _note_damaged(self) -> None:
        """Count and log the samples that did not decode in the last step."""
        self._num_damaged += len(self._step.damaged)
        if self._process.rank == 0:
            for reason in self._step.damaged:
                _logger.warning("sample skipped: %s", reason)

    def _num_skipped(self) -> int:
        """Return the number of samples skipped since the run began."""
        return self._loader.num_skipped + self._num_damaged

    def _save(self) -> Path:
        with hidden_from_children():
            return training_checkpoint.save(
                self._run, self._model, self._optimizer, self._grid, self._progress
            )

    def _resume(self) -> None:
        run, weights = self._run, self._run.training.checkpoint.weights
        parts = (self._model, self._optimizer, self._grid)
        folder = training_checkpoint.find_checkpoint(run)
        if folder is not None:
            self._progress = training_checkpoint.load(folder, run, *parts)
            self._loader.load_state_dict(self._progress.data)
        elif weights:
            training_checkpoint.load_weights(Path(weights), run, *parts)
        # What fails above leaves an earlier run where it is.
        training_checkpoint.set_aside(run, self._process.rank, continued=folder)

    def _summary(self, checkpoint: Path | None) -> dict[str, Any]:
        parallel, progress = self._run.parallel, self._progress
        is_dedicated = parallel.vision.placement == "dedicated"
        return {
            "run": self._run.name,
            "steps": progress.step,
            "tokens": progress.tokens,
            "wall_seconds": progress.seconds,
            "first_loss": progress.first_loss,
            **measure(self._metrics),
            "ranks": {
                "decoder": parallel.decoder.num_ranks,
                "vision": parallel.vision.num_ranks if is_dedicated else "on the decoder's ranks",
            },
            "device": device_name(self._process.device),
            "video_decoder": self._decode_backend(),
            "skipped_samples": self._num_skipped(),
            "checkpoint": str(checkpoint) if checkpoint else None,
        }
