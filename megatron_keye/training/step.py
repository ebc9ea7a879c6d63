"""One training step, from packed rows to updated weights."""

import time
from collections import deque
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.row import RowMeter
from megatron_keye.errors import UserError
from megatron_keye.model import KeyeModel
from megatron_keye.observe.recorder import Recorder, StepRecorder
from megatron_keye.optim.learning_rate import learning_rate
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.schedule import run_step
from megatron_keye.parallel.transport import FeatureTransport
from megatron_keye.plan.slots import returns_gradients
from megatron_keye.plan.step import StepPlan
from megatron_keye.training.agreement import (
    agree_on_damaged,
    count_samples_with_pictures,
    damaged_samples,
    without_labels,
)
from megatron_keye.training.chunk_encoder import ChunkEncoder, PatchSource
from megatron_keye.training.decoder_pass import DecoderPass
from megatron_keye.training.metrics import (
    BatchCounts,
    StepMetrics,
    collect_metrics,
    count_batch,
    decode_sums,
)
from megatron_keye.training.microbatch import balance_rows, plan_rows
from megatron_keye.training.router_load import RouterLoad
from megatron_keye.training.stop import StopRequest

_MAX_STEPS_WITHOUT_PICTURES = 10
"""Most steps in a row in which no picture decodes; with one more the run ends."""


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """One global batch with its plan, kept since planning for hundreds of ranks takes seconds."""

    rows: list[PackedRow]
    """In the order in which the decoder runs them."""
    plan: StepPlan
    """Plan of these rows."""


class TrainingStep:
    """Plans, encodes, runs the decoder and updates; the same code on every kind of rank."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: KeyeModel,
        optimizer: JointOptimizer,
        *,
        source: PatchSource | None,
        stop: StopRequest,
        device: torch.device,
    ) -> None:
        """Prepare for all steps.

        Args:
            run: The run.
            grid: Groups of this rank.
            model: This rank's modules.
            optimizer: Their optimizers.
            source: Supplies the patches of pictures, on ranks that encode; None on others.
            stop: Read once per step.
            device: Where this rank computes.
        """
        self._run, self._grid, self._model, self._optimizer = run, grid, model, optimizer
        self._stop, self._device = stop, device
        self._decoder_pass = DecoderPass(run, grid, model.stages, device) if model.stages else None
        self._decoder_seconds = 0.0
        self.recorder: StepRecorder | None = None
        """Recorder of the last step, where the run records its timeline."""
        self.damaged: list[str] = []
        """A sentence for each sample left out of the last step, the same on all ranks."""
        self._num_steps_without_pictures = 0
        self._announced: deque[tuple[list[PackedRow], _Planned]] = deque()
        self._router_load = RouterLoad(run.model.decoder, model.stages, device)
        self._encoder: ChunkEncoder | None = None
        if model.vision is not None:
            assert source is not None, "a rank that encodes needs a source"
            # With the cache, the source supplies the ViT's features, and only the projector runs.
            projects_only = bool(run.data.feature_cache)
            vision = model.vision.module.projector if projects_only else model.vision
            self._encoder = ChunkEncoder(run, vision, source, device, grid.rank)

    def __call__(self, rows: list[PackedRow], step: int) -> StepMetrics:
        """Train on one global batch.

        Args:
            rows: All rows of the global batch, the same on every rank.
            step: 0-based number of the step.

        Returns:
            The step's metrics, the same on every rank.
        """
        recorder = self._start_recorder()
        started = time.perf_counter()
        planned = self._take_planned(rows)
        meter = RowMeter()
        if self._run.data.on_bad_sample == "skip":
            planned = self._without_damaged(planned)
        counts = count_batch(planned.rows, self._run)
        self._optimizer.zero_gradients()
        self._router_load.reset()
        self._encode_and_run_decoder(planned, meter, counts, recorder)
        rate = learning_rate(step, self._run.training.steps, self._run.training.optimizer)
        with recorder.span("optimizer"):
            self._optimizer.finish_gradients(counts.divisor)
            if self._encoder is None:
                outcome = self._optimizer.step(rate)
            else:
                outcome = self._optimizer.step(rate, self._encoder.encode_ahead)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return collect_metrics(
            meter,
            self._router_load,
            self._run,
            counts=counts,
            outcome=outcome,
            seconds={
                "step": time.perf_counter() - started,
                "decoder": self._decoder_seconds,
                "vision": self._encoder.seconds if self._encoder is not None else 0.0,
                "vision_wait": self._encoder.wait_seconds if self._encoder is not None else 0.0,
            },
            asks_to_stop=bool(self._stop.name),
        )

    def announce(self, rows: list[PackedRow]) -> None:
        """Let this rank decode the pictures of a later step.

        Args:
            rows: All rows of its global batch; steps run in the order of their announcement.
        """
        if self._encoder is not None:
            planned = self._plan(rows)
            self._announced.append((rows, planned))
            self._encoder.announce(planned.plan, planned.rows)

    def _take_planned(self, rows: list[PackedRow]) -> _Planned:
        """Return the plan made when these rows were announced, or plan them now."""
        if not self._announced:
            planned = self._plan(rows)
            if self._encoder is not None:
                self._encoder.announce(planned.plan, planned.rows)
            return planned
        announced, planned = self._announced.popleft()
        assert announced is rows, "steps run in the order in which they were announced"
        return planned

    def _without_damaged(self, planned: _Planned) -> _Planned:
        """Wait until the whole step is decoded, agree on damaged samples, mask their labels."""
        failed = self._encoder.wait_until_decoded() if self._encoder is not None else {}
        damaged = agree_on_damaged(damaged_samples(planned.rows, failed), self._device)
        self.damaged = list(damaged.values())
        self._check_some_decode(count_samples_with_pictures(planned.rows))
        return replace(planned, rows=without_labels(planned.rows, damaged))

    def _check_some_decode(self, num_with_pictures: int) -> None:
        """End the run after many steps in which no picture decodes, as on a broken device."""
        if num_with_pictures > len(self.damaged):
            self._num_steps_without_pictures = 0
        elif num_with_pictures:
            self._num_steps_without_pictures += 1
        if self._num_steps_without_pictures > _MAX_STEPS_WITHOUT_PICTURES:
            raise UserError(
                "data.on_bad_sample=skip: no picture decoded in "
                f"{self._num_steps_without_pictures} steps in a row, expected some; make the "
                f"media readable on the ranks that encode. The last reason was {self.damaged[-1]}"
            )

    def _plan(self, rows: list[PackedRow]) -> _Planned:
        balanced = balance_rows(rows, self._run)
        return _Planned(rows=balanced, plan=plan_rows(balanced, self._run))

    def _start_recorder(self) -> Recorder:
        """Return this step's recorder, whose clock starts on all ranks at a barrier."""
        if not self._run.training.records_timeline:
            return Recorder()
        dist.barrier()
        self.recorder = StepRecorder(self._device)
        return self.recorder

    def _encode_and_run_decoder(
        self, planned: _Planned, meter: RowMeter, counts: BatchCounts, recorder: Recorder
    ) -> None:
        run, rows, plan = self._run, planned.rows, planned.plan
        transport = FeatureTransport(
            plan,
            self._grid,
            recorder,
            width=run.model.decoder.hidden_size,
            dtype=weight_dtype(run),
            device=self._device,
        )
        if self._encoder is not None:
            self._encoder.start_step(plan, rows, recorder)
        run_step(
            plan,
            self._grid,
            transport,
            encoder=self._encoder,
            run_decoder=lambda: self._run_decoder(rows, transport, meter, recorder, counts),
            returns_gradients=returns_gradients(run),
        )
        if self._encoder is not None:
            meter.accumulate(
                "pictures", torch.tensor(self._encoder.num_pictures, device=self._device)
            )
            for name, value in decode_sums(self._encoder.statistics()).items():
                meter.accumulate(
                    name, torch.tensor(value, dtype=torch.float64, device=self._device)
                )

    def _run_decoder(
        self,
        rows: list[PackedRow],
        transport: FeatureTransport,
        meter: RowMeter,
        recorder: Recorder,
        counts: BatchCounts,
    ) -> None:
        assert self._decoder_pass is not None, "only decoder ranks run the decoder"
        started = time.perf_counter()
        weight = self._run.training.indexer_loss_weight
        self._decoder_pass(
            rows,
            transport,
            meter,
            recorder,
            # All gradients are divided by counts.divisor at the end; these factors turn the other
            # losses into means over queries and over tokens, whatever labels weigh.
            indexer_loss_weight=weight * counts.divisor / max(1, counts.indexer_queries),
            balance_loss_scale=counts.divisor / counts.tokens,
        )
        self._decoder_seconds = time.perf_counter() - started
