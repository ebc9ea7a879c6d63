# SPDX-License-Identifier: Apache-2.0
"""The metrics of a step, reduced over all ranks.

Every rank contributes its sums, zeros where it has none, and all get the result.
"""

import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.data.video.decode_service import DecodeStatistics
from megatron_keye.decoder.row import METER_NAMES, MeterName, RowMeter
from megatron_keye.estimate.account import model_flops
from megatron_keye.optim.optimizer import StepOutcome
from megatron_keye.training.router_load import RouterLoad
from megatron_keye.training.throughput import device_name, peak_tflops


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Token counts of one global batch, and its FLOPs."""

    loss_weight: float
    """Sum of the weights of all labels; the number of labels where each weighs 1."""
    queries: int
    """Real tokens."""
    indexer_queries: int
    """Real tokens in rows that have an indexer loss, once for every path through each."""
    tokens: int
    """All tokens, padding included."""
    flops: float
    """Model FLOPs of the training step (`estimate.account.model_flops`)."""

    def __add__(self, other: Self) -> Self:
        """Return the counts of two batches together."""
        mine, theirs = asdict(self), asdict(other)
        return type(self)(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def divisor(self) -> float:
        """Divisor of all gradients: the labels' weight, or real tokens where none has a label."""
        return self.loss_weight or float(max(1, self.queries))


def count_batch(rows: Sequence[PackedRow], run: RunConfig) -> BatchCounts:
    """Count the rows of a global batch."""
    return BatchCounts(
        # Rounded once, so that it does not depend on the order of rows, which is the grid's.
        loss_weight=math.fsum(row.loss_weight for row in rows),
        queries=sum(row.num_real_tokens for row in rows),
        indexer_queries=sum(
            row.num_indexer_queries
            for row in rows
            if run.training.row_phase(row.longest_document) != "dense"
        ),
        tokens=sum(len(row.token_ids) for row in rows),
        flops=model_flops(run, [row.sizes for row in rows]),
    )


@dataclass(frozen=True, kw_only=True)
class MeanLosses:
    """Losses of rows, means over all ranks."""

    loss: float
    """Language loss, mean over labels by their weights, in nats; NaN without any."""
    indexer_kl: float
    """KL divergence of attention from the indexer, mean over queries, groups and layers, in nats,
    in rows that do not attend densely; NaN without any."""
    indexer_recall: float
    """Share of dense attention mass on the selected keys, over sampled queries of sparse
    rows; NaN without any."""


def mean_losses(
    sums: Mapping[MeterName, float], counts: BatchCounts, run: RunConfig
) -> MeanLosses:
    """Return the means of losses.

    Args:
        sums: Sums over all ranks by the meter's names; "language_loss", "indexer_kl", "recall" and
            "recall_queries" are read.
        counts: Counts of the same rows.
        run: Sizes.
    """
    decoder, nan = run.model.decoder, float("nan")
    kl_terms = counts.indexer_queries * decoder.num_kv_heads * decoder.num_layers
    queries = sums["recall_queries"]
    return MeanLosses(
        loss=sums["language_loss"] / counts.loss_weight if counts.loss_weight else nan,
        indexer_kl=sums["indexer_kl"] / kl_terms if kl_terms else nan,
        indexer_recall=sums["recall"] / queries if queries else nan,
    )


@dataclass(frozen=True, kw_only=True)
class StepMetrics(MeanLosses):
    """Metrics of one step, the same on every rank."""

    router_load: float
    """Tokens of the busiest expert over the mean, averaged over layers; 1 is balanced."""
    gradient_norm: float
    """L2 norm over decoder and vision together, before clipping."""
    learning_rate: float
    """Learning rate of the step."""
    was_applied: bool
    """False when the step was bad and changed no weight."""
    tokens: int
    """Real tokens of the global batch."""
    tokens_per_second: float
    """Real tokens of the global batch per second of `step_seconds`."""
    tflops_per_device: float
    """Model FLOPs (`estimate.account.model_flops`) per second and rank, in 1e12."""
    mfu: float
    """Model FLOPs utilization: the same over the device's peak; NaN where that is unknown."""
    step_seconds: float
    """From the end of the step before to the end of this one, on the slowest rank."""
    data_wait_seconds: float
    """The part of it spent waiting for this step's rows, on the rank that waited longest."""
    save_seconds: float
    """The part of it in which training stood still for a checkpoint, on the slowest rank."""
    saved_seconds: float
    """From the beginning to the end of a save that became complete in this step, most of it
    beside training, on the slowest rank; 0 without one."""
    validation_seconds: float
    """The part of it spent on a validation after the step before, on the slowest rank."""
    decoder_seconds: float
    """The decoder's passes, waits for features and other stages included, on the slowest rank."""
    vision_seconds: float
    """Both passes of the ViT and waits for decoded pictures, on the busiest rank that encodes."""
    vision_wait_seconds: float
    """Waits for decoded pictures, on the rank that waited longest."""
    decoded_per_second: float
    """Images and frames per second of decoding, summed over ranks."""
    decode_queue: float
    """Mean number of decoded chunks that were ready when the encoder asked for one; at 0 it waits
    for decoding."""
    pictures: int
    """Images and frames that were encoded."""
    padding_share: float
    """Share of padding in the packed rows."""
    peak_memory_gib: float
    """GiB of tensors on the fullest GPU, at their peak so far (with training.records_timeline, in
    this step); without GPUs, the peak of the largest process."""
    asks_to_stop: bool
    """Whether any rank was asked to stop before this step ended."""
    has_failed_save: bool
    """Whether any rank knew before this step ended that a checkpoint could not be written."""

    def scalars(self) -> dict[str, float]:
        """Return all metrics as floats, by name."""
        return {name: float(value) for name, value in asdict(self).items()}


def collect_metrics(
    meter: RowMeter,
    router_load: RouterLoad,
    run: RunConfig,
    *,
    counts: BatchCounts,
    outcome: StepOutcome,
    seconds: dict[str, float],
    asks_to_stop: bool,
    has_failed_save: bool,
) -> StepMetrics:
    """Reduce what all ranks measured. All ranks must call it.

    Args:
        meter: Sums of this rank's rows and layers.
        router_load: Counts of this rank's routers.
        run: Sizes and degrees.
        counts: Counts of the global batch.
        outcome: Result of the optimizer step.
        seconds: This rank's seconds in the "step", its parts "data_wait", "save" and
            "validation", a whole save ("saved"), the "decoder", "vision" and, as a part of vision,
            "vision_wait".
        asks_to_stop: Whether this rank was asked to stop; reduced with the times.
        has_failed_save: Whether this rank knows that a checkpoint could not be written; likewise.
    """
    device = router_load.counts_LE.device
    marks = {"stop": asks_to_stop, "failed_save": has_failed_save}
    maxima = seconds | marks | {"peak_memory": _peak_memory_gib(device)}
    sums, largest, counts_LE = _reduce(meter, router_load, maxima)
    tflops = counts.flops / largest["step"] / run.parallel.num_ranks / 1e12
    return StepMetrics(
        **vars(mean_losses(sums, counts, run)),
        router_load=float((counts_LE.amax(1) / counts_LE.mean(1).clamp(min=1)).mean()),
        gradient_norm=outcome.gradient_norm,
        learning_rate=outcome.learning_rate,
        was_applied=outcome.was_applied,
        tokens=counts.queries,
        tokens_per_second=counts.queries / largest["step"],
        tflops_per_device=tflops,
        mfu=tflops / peak_tflops(run, device_name(device)),
        step_seconds=largest["step"],
        data_wait_seconds=largest["data_wait"],
        save_seconds=largest["save"],
        saved_seconds=largest["saved"],
        validation_seconds=largest["validation"],
        decoder_seconds=largest["decoder"],
        vision_seconds=largest["vision"],
        vision_wait_seconds=largest["vision_wait"],
        decoded_per_second=sums["decoded_per_second"],
        decode_queue=sums["ready_chunks"] / max(1.0, sums["taken_chunks"]),
        pictures=round(sums["pictures"]),
        padding_share=1 - counts.queries / counts.tokens,
        peak_memory_gib=largest["peak_memory"],
        asks_to_stop=bool(largest["stop"]),
        has_failed_save=bool(largest["failed_save"]),
    )


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def decode_sums(statistics: DecodeStatistics) -> dict[MeterName, float]:
    """Return the sums that a rank contributes about its decoding, by name."""
    busy = statistics.busy_seconds
    return {
        "decoded_per_second": statistics.pictures / busy if busy else 0.0,
        "ready_chunks": float(statistics.ready_chunks),
        "taken_chunks": float(statistics.takes),
    }


def _reduce(
    meter: RowMeter, router_load: RouterLoad, maxima: dict[str, float]
) -> tuple[dict[MeterName, float], dict[str, float], Tensor]:
    """Sum the meter and the router counts over all ranks, and take the largest of `maxima`."""
    device = router_load.counts_LE.device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    named = torch.stack([meter.sums.get(name, zero) for name in METER_NAMES])
    vector = torch.cat([named, router_load.counts_LE.flatten()])
    largest = torch.tensor(list(maxima.values()), dtype=torch.float64, device=device)
    dist.all_reduce(vector)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    vector = vector.cpu()
    num_sums = len(METER_NAMES)
    sums = dict(zip(METER_NAMES, vector[:num_sums].tolist(), strict=True))
    counts_LE = vector[num_sums:].view_as(router_load.counts_LE)
    return sums, dict(zip(maxima, largest.tolist(), strict=True)), counts_LE
