# SPDX-License-Identifier: Apache-2.0
"""Runs one global batch through vision and decoder; the same code on every kind of rank.

Training runs it forward and backward, validation forward only.
"""

import time
from collections import deque
from dataclasses import dataclass, replace

import torch

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.row import RowMeter
from megatron_keye.errors import UserError
from megatron_keye.model import KeyeModel
from megatron_keye.observe.recorder import Recorder
from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.schedule import run_step
from megatron_keye.parallel.transport import FeatureTransport
from megatron_keye.plan.slots import vision_learns
from megatron_keye.plan.step import StepPlan
from megatron_keye.training.agreement import (
    agree_on_damaged,
    count_samples_with_pictures,
    damaged_samples,
    without_labels,
)
from megatron_keye.training.chunk_encoder import ChunkEncoder, PatchSource
from megatron_keye.training.decoder_pass import DecoderPass
from megatron_keye.training.metrics import BatchCounts, decode_sums
from megatron_keye.training.microbatch import balance_rows, plan_rows

_MAX_BATCHES_WITHOUT_PICTURES = 10
"""Most batches in a row in which no picture decodes; with one more the run ends."""


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """One global batch with its plan, kept since planning for hundreds of ranks takes seconds."""

    rows: list[PackedRow]
    """In the order in which the decoder runs them."""
    plan: StepPlan
    """Plan of these rows."""


class BatchPass:
    """Plans, decodes and encodes global batches, and runs the decoder on them."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: KeyeModel,
        *,
        source: PatchSource | None,
        device: torch.device,
        is_forward_only: bool = False,
        kept_patches: int = 0,
    ) -> None:
        """Prepare for all batches.

        Args:
            run: The run.
            grid: Groups of this rank.
            model: This rank's modules.
            source: Supplies the patches of pictures, on ranks that encode; None on others.
            device: Where this rank computes.
            is_forward_only: Whether there is no backward pass.
            kept_patches: Most patches whose activations wait for their backward pass at once.
        """
        self._run, self._grid, self._device = run, grid, device
        self._returns_gradients = vision_learns(run) and not is_forward_only
        self._decoder_pass = (
            DecoderPass(run, grid, model.stages, device, is_forward_only=is_forward_only)
            if model.stages
            else None
        )
        self._decoder_seconds = 0.0
        self.damaged: list[str] = []
        """A sentence for each sample left out of the last batch, the same on all ranks."""
        self._num_batches_without_pictures = 0
        self._announced: deque[tuple[list[PackedRow], PlannedBatch]] = deque()
        self._encoder: ChunkEncoder | None = None
        if model.vision is not None:
            assert source is not None, "a rank that encodes needs a source"
            # With the cache, the source supplies the ViT's features, and only the projector runs.
            projects_only = bool(run.data.feature_cache)
            vision = model.vision.module.projector if projects_only else model.vision
            self._encoder = ChunkEncoder(
                run,
                vision,
                source,
                device,
                grid.rank,
                learns=self._returns_gradients,
                kept_patches=kept_patches,
            )

    @property
    def seconds(self) -> dict[str, float]:
        """This rank's seconds in the last batch, as `collect_metrics` takes them."""
        encoder = self._encoder
        return {
            "decoder": self._decoder_seconds,
            "vision": encoder.seconds if encoder is not None else 0.0,
            "vision_wait": encoder.wait_seconds if encoder is not None else 0.0,
        }

    def announce(self, rows: list[PackedRow]) -> None:
        """Plan a later batch, and let this rank decode its pictures. May run in another thread.

        Args:
            rows: All rows of the batch; batches run in the order of their announcement.
        """
        planned = self._plan(rows)
        if self._encoder is not None:
            self._encoder.announce(planned.plan, planned.rows)
        self._announced.append((rows, planned))

    def announce_again(self, planned: PlannedBatch) -> None:
        """Let this rank decode the pictures of a batch that another pass has taken.

        Args:
            planned: From `take`; it runs without being taken once more.
        """
        if self._encoder is not None:
            self._encoder.announce(planned.plan, planned.rows)

    def take(self, rows: list[PackedRow]) -> PlannedBatch:
        """Return the plan of the next batch. Collective with data.on_bad_sample=skip.

        Samples that do not decode lose their labels then, and are in `damaged`.

        Args:
            rows: All rows of the batch; if any batch was announced, those of the first.
        """
        if not self._announced:
            self.announce(rows)
        announced, planned = self._announced.popleft()
        assert announced is rows, "batches run in the order in which they were announced"
        if self._run.data.on_bad_sample == "skip":
            return self._without_damaged(planned)
        return planned

    def __call__(
        self, planned: PlannedBatch, meter: RowMeter, counts: BatchCounts, recorder: Recorder
    ) -> None:
        """Run the batch; gradients, where there are any, are not reduced yet.

        Args:
            planned: From `take`.
            meter: Accumulates what this rank measures.
            counts: Counts of the batch.
            recorder: Records when passes run.
        """
        transport = FeatureTransport(
            planned.plan,
            self._grid,
            recorder,
            width=self._run.model.decoder.hidden_size,
            dtype=weight_dtype(self._run),
            device=self._device,
        )
        if self._encoder is not None:
            self._encoder.start_step(planned.plan, planned.rows, recorder)
        run_step(
            planned.plan,
            self._grid,
            transport,
            encoder=self._encoder,
            run_decoder=lambda: self._run_decoder(
                planned.rows, transport, meter, recorder, counts
            ),
            returns_gradients=self._returns_gradients,
        )
        if self._encoder is not None:
            self._meter_encoder(self._encoder, meter)

    def encode_ahead(self) -> bool:
        """Encode one more chunk of the next batch where that is possible; whether it was."""
        return self._encoder is not None and self._encoder.encode_ahead()

    def _plan(self, rows: list[PackedRow]) -> PlannedBatch:
        balanced = balance_rows(rows, self._run)
        plan = plan_rows(balanced, self._run, returns_gradients=self._returns_gradients)
        return PlannedBatch(rows=balanced, plan=plan)

    def _without_damaged(self, planned: PlannedBatch) -> PlannedBatch:
        """Wait until the whole batch is decoded, agree on damaged samples, mask their labels."""
        failed = self._encoder.wait_until_decoded() if self._encoder is not None else {}
        damaged = agree_on_damaged(damaged_samples(planned.rows, failed), self._device)
        self.damaged = list(damaged.values())
        self._check_some_decode(count_samples_with_pictures(planned.rows))
        return replace(planned, rows=without_labels(planned.rows, damaged))

    def _check_some_decode(self, num_with_pictures: int) -> None:
        """End the run after many batches in which no picture decodes, as on a broken device."""
        if num_with_pictures > len(self.damaged):
            self._num_batches_without_pictures = 0
        elif num_with_pictures:
            self._num_batches_without_pictures += 1
        if self._num_batches_without_pictures > _MAX_BATCHES_WITHOUT_PICTURES:
            raise UserError(
                "data.on_bad_sample=skip: no picture decoded in "
                f"{self._num_batches_without_pictures} steps in a row, expected some; make the "
                f"media readable on the ranks that encode. The last reason was {self.damaged[-1]}"
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
            # losses into means over queries and over tokens.
            indexer_loss_weight=weight * counts.divisor / max(1, counts.indexer_queries),
            balance_loss_scale=counts.divisor / counts.tokens,
        )
        self._decoder_seconds = time.perf_counter() - started

    def _meter_encoder(self, encoder: ChunkEncoder, meter: RowMeter) -> None:
        sums = {"pictures": float(encoder.num_pictures), **decode_sums(encoder.statistics())}
        for name, value in sums.items():
            meter.accumulate(name, torch.tensor(value, dtype=torch.float64, device=self._device))
