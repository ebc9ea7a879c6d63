# SPDX-License-Identifier: Apache-2.0
"""Loss of samples that are not trained on, on the grid of training and without a trace in it.

Decoding, plan and passes are those of training, but forward only and with a decode service of
their own. So random numbers, the order of samples, gradients and the next step's pictures stay as
they are.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import batched

import torch
import torch.distributed as dist

from megatron_keye.config.data import ALL_SOURCES
from megatron_keye.config.run import RunConfig
from megatron_keye.data.one_pass import OnePass
from megatron_keye.data.row import PackedRow
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.decoder.row import MeterName, RowMeter
from megatron_keye.model import KeyeModel
from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.observe.recorder import Recorder
from megatron_keye.parallel.grid import Grid
from megatron_keye.training.agreement import check_same_rows
from megatron_keye.training.batch_pass import BatchPass
from megatron_keye.training.chunk_encoder import PatchSource
from megatron_keye.training.metrics import BatchCounts, MeanLosses, count_batch, mean_losses
from megatron_keye.training.patch_source import open_patch_source

_SUMS: tuple[MeterName, ...] = ("language_loss", "indexer_kl", "recall", "recall_queries")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Losses of one validation, the same on every rank."""

    by_source: dict[str, MeanLosses]
    """Of each source."""
    total: MeanLosses
    """Of the rows of all sources together."""
    num_damaged: int
    """Samples that do not count, since their media did not decode."""

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the losses by source, and "all", and by name; those that are NaN are left out."""
        return {
            source: {
                name: value
                for name, value in vars(losses).items()
                if name == "loss" or not math.isnan(value)
            }
            for source, losses in (self.by_source | {ALL_SOURCES: self.total}).items()
        }


class Validation:
    """Computes the losses of the validation's rows, always the same ones."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: KeyeModel,
        sources: Mapping[str, Iterable[PackedRow]],
        *,
        padding_row: PackedRow,
        open_patches: Callable[[], PatchSource | None],
        device: torch.device,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """Prepare for all validations.

        Args:
            run: The run.
            grid: Groups of this rank.
            model: This rank's modules.
            sources: Rows of each source by its name, the same on every rank.
            padding_row: A row without samples, to fill up batches.
            open_patches: Opens the source of the encoder's input, None on ranks without encoder;
                it is closed after each validation.
            device: Where this rank computes.
            heartbeat: Told of each pass; by default one that nobody reads.
        """
        self._run, self._grid, self._model, self._device = run, grid, model, device
        self._recorder = Recorder(heartbeat)
        self._sources, self._padding_row = sources, padding_row
        self._open_patches = open_patches

    def __call__(self) -> ValidationResult:
        """Run all rows forward. Collective: all ranks must call it.

        Raises:
            UserError: For media or samples that cannot be read, unless such are skipped.
        """
        patches = self._open_patches()
        try:
            with self._model.evaluation():
                return self._run_rows(patches)
        finally:
            if patches is not None:
                patches.close()

    def _run_rows(self, patches: PatchSource | None) -> ValidationResult:
        batch_pass = BatchPass(
            self._run,
            self._grid,
            self._model,
            source=patches,
            device=self._device,
            is_forward_only=True,
        )
        meters = {name: RowMeter() for name in self._sources}
        counts = {name: count_batch([], self._run) for name in self._sources}
        num_damaged = 0
        for name, rows in _one_ahead(self._batches(), batch_pass.announce):
            if self._run.data.on_bad_sample == "skip":
                check_same_rows(rows, self._device)
            planned = batch_pass.take(rows)
            num_damaged += len(batch_pass.damaged)
            batch_counts = count_batch(planned.rows, self._run)
            batch_pass(planned, meters[name], batch_counts, self._recorder)
            counts[name] += batch_counts
            self._log_damaged(batch_pass.damaged)
        return self._result(meters, counts, num_damaged)

    def _batches(self) -> Iterator[tuple[str, list[PackedRow]]]:
        """Yield the rows of each source in batches, each with what the grid needs to be full."""
        for name, rows in self._sources.items():
            for batch in batched(rows, self._run.training.rows_per_step):
                num_missing = -len(batch) % self._run.rows_multiple
                yield name, [*batch, *[self._padding_row] * num_missing]

    def _log_damaged(self, damaged: list[str]) -> None:
        if self._grid.rank == 0:
            for reason in damaged:
                _logger.warning("sample left out of validation: %s", reason)

    def _result(
        self, meters: dict[str, RowMeter], counts: dict[str, BatchCounts], num_damaged: int
    ) -> ValidationResult:
        """Sum over ranks what the meters hold."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        of_sources = [meter.sums.get(sum_, zero) for meter in meters.values() for sum_ in _SUMS]
        reduced = torch.stack(of_sources).view(-1, len(_SUMS))
        dist.all_reduce(reduced)
        losses = {}
        for name, values in zip(meters, reduced.tolist(), strict=True):
            sums = dict(zip(_SUMS, values, strict=True))
            losses[name] = mean_losses(sums, counts[name], self._run)
        all_sums = dict(zip(_SUMS, reduced.sum(dim=0).tolist(), strict=True))
        all_counts = sum(counts.values(), start=count_batch([], self._run))
        return ValidationResult(
            by_source=losses,
            total=mean_losses(all_sums, all_counts, self._run),
            num_damaged=num_damaged,
        )


def open_validation(
    run: RunConfig,
    grid: Grid,
    model: KeyeModel,
    *,
    padding_row: PackedRow,
    device: torch.device,
    heartbeat: Heartbeat,
) -> Validation | None:
    """Open the samples of validation, and find bad ones before the run; None without samples.

    Args:
        run: The run.
        grid: Groups of this rank.
        model: This rank's modules.
        padding_row: A row without samples.
        device: Where this rank computes.
        heartbeat: Told of each pass.

    Raises:
        UserError: For a source that is missing or malformed, or a bad sample unless it is skipped.
    """
    if not run.data.validation_sources:
        return None
    num_rows = run.training.validation.num_rows
    sources = {
        source.name: OnePass(source.path, run.data, run.model, num_rows)
        for source in run.data.validation_sources
    }
    if grid.rank == 0:
        shown = ", ".join(f"{len(rows)} rows of {name}" for name, rows in sources.items())
        _logger.info("validating on %s", shown)
    return Validation(
        run,
        grid,
        model,
        sources,
        padding_row=padding_row,
        open_patches=partial(open_patch_source, run, model, device, node_cache().probe),
        device=device,
        heartbeat=heartbeat,
    )


def _one_ahead(
    batches: Iterator[tuple[str, list[PackedRow]]], announce: Callable[[list[PackedRow]], None]
) -> Iterator[tuple[str, list[PackedRow]]]:
    """Yield batches, each after the one behind it was announced for decoding."""
    waiting = None
    for batch in batches:
        announce(batch[1])
        if waiting is not None:
            yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting
