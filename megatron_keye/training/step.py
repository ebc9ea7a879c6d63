# SPDX-License-Identifier: Apache-2.0
"""One training step, from packed rows to updated weights."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatron_keye.checkpoint.random_state import random_state, restore_random
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.row import MeterName, RowMeter
from megatron_keye.model import KeyeModel
from megatron_keye.observe.recorder import Recorder, StepRecorder
from megatron_keye.observe.stragglers import WORK, Slowness, compare, work_seconds
from megatron_keye.optim.learning_rate import learning_rate
from megatron_keye.optim.measured import Measured
from megatron_keye.optim.optimizer import JointOptimizer, StepOutcome
from megatron_keye.parallel.grid import Grid
from megatron_keye.plan.places import peers_of
from megatron_keye.training.batch_pass import BatchPass, PlannedBatch
from megatron_keye.training.chunk_encoder import PatchSource
from megatron_keye.training.health.judge import Judge
from megatron_keye.training.health.sick_tensors import sick_tensors
from megatron_keye.training.kept_patches import kept_patches
from megatron_keye.training.metrics import (
    BatchCounts,
    StepMetrics,
    collect_metrics,
    count_batch,
)
from megatron_keye.training.router_load import RouterLoad
from megatron_keye.training.saving import Saving
from megatron_keye.training.step_clock import StepClock
from megatron_keye.training.step_profiler import STEP_RANGE, StepProfiler
from megatron_keye.training.stop import StopRequest


class TrainingStep:
    """Runs a batch forward and backward and updates; the same code on every kind of rank."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: KeyeModel,
        optimizer: JointOptimizer,
        *,
        source: PatchSource | None,
        open_source: Callable[[], PatchSource | None],
        judge: Judge,
        stop: StopRequest,
        saving: Saving,
        clock: StepClock,
        device: torch.device,
    ) -> None:
        """Prepare for all steps.

        Args:
            run: The run.
            grid: Groups of this rank.
            model: This rank's modules.
            optimizer: Their optimizers.
            source: Supplies the patches of pictures, on ranks that encode; None on others.
            open_source: Opens another such source, for a step that is computed again while the
                first one decodes the next step.
            judge: Decides whether a step changes weights.
            stop: Read once per step.
            saving: Likewise.
            clock: Measures steps; a step ends when its weights are updated.
            device: Where this rank computes.
        """
        self._run, self._grid, self._device = run, grid, device
        self._model, self._optimizer = model, optimizer
        self._open_source, self._judge = open_source, judge
        self._stop, self._saving, self._clock = stop, saving, clock
        self._profiler = StepProfiler(run, model, grid.rank, device)
        self._kept_patches = kept_patches(run, grid, device)
        self._batch_pass = self._open_batch_pass(source)
        self.recorder: StepRecorder | None = None
        """Recorder of the last step, where the run records its timeline."""
        self.slowness: list[Slowness] = []
        """The slowest rank in each kind of work in the last step, where ranks were compared."""
        self.log_probs: list[tuple[Tensor, Tensor]] = []
        """Of the answers' tokens that this rank ran in the last step (`RowMeter.log_probs`)."""
        self._router_load = RouterLoad(run.model.decoder, model.stages, device)

    @property
    def damaged(self) -> list[str]:
        """A sentence for each sample left out of the last step, the same on all ranks."""
        return self._batch_pass.damaged

    def __call__(
        self, rows: list[PackedRow], step: int, num_steps: int | None = None
    ) -> StepMetrics:
        """Train on one global batch.

        Args:
            rows: All rows of the global batch, the same on every rank.
            step: 0-based number of the step.
            num_steps: Steps of the whole run as far as they are known; by default those that the
                run sets.

        Returns:
            The step's metrics, the same on every rank.
        """
        planned = self._batch_pass.take(rows)
        with self._profiler.step(step, planned.rows, planned.plan):
            recorder = self._start_recorder(step)
            with record_function(STEP_RANGE):
                return self._run_step(planned, step, num_steps, recorder)

    def _run_step(
        self, planned: PlannedBatch, step: int, num_steps: int | None, recorder: Recorder
    ) -> StepMetrics:
        states = random_state()
        meter, counts = RowMeter(), count_batch(planned.rows, self._run)
        measured = self._compute(self._batch_pass, planned, meter, counts, recorder)
        self.log_probs = meter.log_probs
        may_update = self._judge.may_update(
            measured,
            _mean_loss(measured, counts),
            compute_again=lambda: self._compute_again(planned, counts, states),
            name_sick=partial(sick_tensors, self._model, self._optimizer, self._grid),
        )
        training = self._run.training
        rate = learning_rate(step, num_steps or training.steps, training.optimizer)
        if may_update:
            with recorder.span("optimizer"):
                self._optimizer.update(rate, measured.gradient_norm)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        with self._clock.heartbeat.doing("metrics", exchange="the metrics of all ranks"):
            seconds = self._clock.end_step() | self._batch_pass.seconds
            metrics = collect_metrics(
                meter,
                self._router_load,
                self._run,
                counts=counts,
                outcome=StepOutcome(measured.gradient_norm, rate, was_applied=may_update),
                seconds=seconds,
                asks_to_stop=bool(self._stop.name),
                has_failed_save=self._saving.has_failed,
            )
            self.slowness = self._compare_ranks(
                recorder, metrics.step_seconds, data_wait=seconds["data_wait"]
            )
        return metrics

    def compute_only(self, rows: list[PackedRow]) -> tuple[float, Measured]:
        """Compute the losses and gradients of a global batch, and change no weight.

        Args:
            rows: As in a step.

        Returns:
            The mean language loss, and the figures of all ranks.
        """
        planned = self._batch_pass.take(rows)
        counts = count_batch(planned.rows, self._run)
        measured = self._compute(self._batch_pass, planned, RowMeter(), counts, Recorder())
        return _mean_loss(measured, counts), measured

    def announce(self, rows: list[PackedRow]) -> None:
        """Plan a later step, and let this rank decode its pictures. May run in another thread.

        Args:
            rows: All rows of its global batch; steps run in the order of their announcement.
        """
        self._batch_pass.announce(rows)

    def _compute(
        self,
        batch_pass: BatchPass,
        planned: PlannedBatch,
        meter: RowMeter,
        counts: BatchCounts,
        recorder: Recorder,
    ) -> Measured:
        """Compute losses and gradients of a batch that was taken, and measure them."""
        self._optimizer.zero_gradients()
        self._router_load.reset()
        batch_pass(planned, meter, counts, recorder)
        losses = [self._sum(meter, "language_loss"), self._sum(meter, "indexer_kl")]
        with recorder.span("optimizer"):
            with recorder.exchange("the sum of gradients"):
                self._optimizer.finish_gradients(counts.divisor)
            with recorder.exchange("the gradient norm"):
                return self._optimizer.measure(losses, batch_pass.encode_ahead)

    def _open_batch_pass(self, source: PatchSource | None) -> BatchPass:
        return BatchPass(
            self._run,
            self._grid,
            self._model,
            source=source,
            device=self._device,
            kept_patches=self._kept_patches,
        )

    def _compute_again(
        self, planned: PlannedBatch, counts: BatchCounts, states: dict[str, Any]
    ) -> Measured:
        """Compute a step's losses and gradients once more, from the same random states."""
        restore_random(states)
        source = self._open_source()
        again = self._open_batch_pass(source)
        recorder = Recorder(self._clock.heartbeat)
        try:
            again.announce_again(planned)
            return self._compute(again, planned, RowMeter(), counts, recorder)
        finally:
            if source is not None:
                source.close()

    def _sum(self, meter: RowMeter, name: MeterName) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        return meter.sums.get(name, zero)

    def _start_recorder(self, step: int) -> Recorder:
        """Return this step's recorder; that of a timeline starts on all ranks at a barrier."""
        heartbeat = self._clock.heartbeat
        if self._run.training.records_timeline:
            dist.barrier()
            self.recorder = StepRecorder(self._device, heartbeat)
            return self.recorder
        every = self._run.training.logging.straggler_steps
        # What a process compiles in its first step differs between ranks.
        if every and (step + 1) % every == 0 and not heartbeat.is_first_step:
            return StepRecorder(self._device, heartbeat)
        return Recorder(heartbeat)

    def _compare_ranks(
        self, recorder: Recorder, step_seconds: float, *, data_wait: float
    ) -> list[Slowness]:
        """Compare the work of all ranks in a step that was recorded. Collective then."""
        if not isinstance(recorder, StepRecorder):
            return []
        seconds = work_seconds(recorder.spans(), data_wait=data_wait)
        mine = torch.tensor(seconds, dtype=torch.float64, device=self._device)
        num_ranks = self._run.parallel.num_ranks
        gathered = mine.new_empty(num_ranks * len(WORK))
        dist.all_gather_into_tensor(gathered, mine)
        roles = [peers_of(self._run.parallel, rank) for rank in range(num_ranks)]
        of_ranks = gathered.view(num_ranks, len(WORK)).tolist()
        return compare(of_ranks, roles, step_seconds=step_seconds)


def _mean_loss(measured: Measured, counts: BatchCounts) -> float:
    """Return the mean language loss, NaN if nothing has a label."""
    return measured.loss_sum / counts.loss_weight if counts.loss_weight else math.nan
