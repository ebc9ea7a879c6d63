"""Estimates a step's time and the idle time of ranks, from a run and the sizes of its rows.

Times are FLOPs over an assumed speed, which is the weak point; the order of events is exact, since
it comes from the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from megatron_keye.config.run import RunConfig
from megatron_keye.data.placeholders import picture_slots
from megatron_keye.data.row import PackedRow
from megatron_keye.estimate.simulate import Simulated, StepCosts, simulate
from megatron_keye.plan.cost import (
    VisionCost,
    attention_flops,
    token_flops,
    vision_cost,
    vision_flops,
)
from megatron_keye.plan.order import Exchange, Pass
from megatron_keye.plan.places import DecoderPlace, vision_ranks
from megatron_keye.plan.slots import RowSizes, balanced_order, plan_slots, vision_learns
from megatron_keye.plan.step import Chunk, PictureSlot, StepPlan, plan_messages

_TRIED_FACTORS = (0.8, 1.0, 1.25, 1.6)
"""Numbers of vision ranks to simulate, relative to the one that makes the work per rank equal."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Sustained speeds of one device; assumptions, to be replaced by measurements."""

    vision_tflops: float = 350.0
    """TFLOP/s of the ViT, in bf16."""
    decoder_tflops: float = 200.0
    """TFLOP/s of the decoder, experts and their all-to-all included."""
    link_gigabytes_per_second: float = 40.0
    """Bandwidth of one rank for features, in 1e9 bytes per second."""


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """Sizes of one packed row."""

    document_lengths: tuple[int, ...]
    """Tokens of each document, padding included; of each branch where documents branch."""
    pictures: tuple[PictureSlot, ...]
    """Its pictures; their row and index are ignored."""
    num_earlier: tuple[int, ...] = (0,)
    """Tokens before each branch on its path; 0 for all by default."""

    @property
    def sizes(self) -> RowSizes:
        """What its cost follows from."""
        patches = [picture.num_patches for picture in self.pictures]
        return RowSizes(self.document_lengths, patches, self.num_earlier)


def shape_of(row: PackedRow, run: RunConfig) -> RowShape:
    """Return the sizes of a row.

    Raises:
        UserError: If its placeholders are not where its pictures go.
    """
    branches = row.branches
    lengths, earlier = (tuple(each.tolist()) for each in (branches.lengths, branches.num_earlier))
    pictures = tuple(picture_slots([row], run))
    return RowShape(document_lengths=lengths, pictures=pictures, num_earlier=earlier)


def balance_shapes(rows: Sequence[RowShape], run: RunConfig) -> list[RowShape]:
    """Return the rows in training's order."""
    return [rows[place] for place in balanced_order([row.sizes for row in rows], run)]


def plan_balanced(rows: Sequence[RowShape], run: RunConfig) -> StepPlan:
    """Return the plan that training makes for rows in this order."""
    return plan_slots(_slots(rows), len(rows), run)


def plan_dealt(
    rows: Sequence[RowShape], run: RunConfig, *, deal: Literal["documents", "counts"]
) -> StepPlan:
    """Return a plan that ignores costs, as a baseline.

    Args:
        rows: In the order in which the decoder runs them.
        run: Sizes and degrees.
        deal: "documents": whole documents round-robin, as data parallelism over samples does.
            "counts": the same number of consecutive pictures for each rank.
    """
    ranks = vision_ranks(run.parallel)
    if deal == "documents":
        shares = _pictures_by_document(rows)
    else:
        slots = _slots(rows)
        bounds = np.linspace(0, len(slots), len(ranks) + 1).astype(int).tolist()
        shares = [slots[start:end] for start, end in pairwise(bounds) if start < end]
    chunks: list[Chunk] = []
    for number, share in enumerate(shares):
        pictures: list[PictureSlot] = []
        rank = ranks[number % len(ranks)]
        for slot in share:
            patches = sum(picture.num_patches for picture in pictures) + slot.num_patches
            if pictures and patches > run.parallel.vision.chunk_patches:
                chunks.append(Chunk(vision_rank=rank, pictures=tuple(pictures)))
                pictures = []
            pictures.append(slot)
        chunks.append(Chunk(vision_rank=rank, pictures=tuple(pictures)))
    return plan_messages(
        chunks,
        num_rows=len(rows),
        row_tokens=run.data.row_tokens,
        parallel=run.parallel,
        returns_gradients=vision_learns(run),
    )


def try_vision_ranks(
    rows: Sequence[RowShape], run: RunConfig, speeds: Speeds
) -> list[tuple[int, Simulated]]:
    """Simulate a batch with several numbers of dedicated vision ranks.

    Args:
        rows: Rows of the global batch, in the order in which the decoder runs them.
        run: The run; its decoder grid is kept, its vision placement ignored.
        speeds: Speeds of a device.

    Returns:
        Pairs of number and result, around the number at which vision and decoder ranks have equal
        work, fewest rank-seconds first. Empty for a batch without pictures.
    """
    forecast = Forecast(rows, run, speeds)
    vision_work = forecast.vision_seconds() * forecast.vision_passes
    if vision_work == 0:
        return []
    decoder_work = forecast.decoder_seconds() * forecast.decoder_passes
    even = run.parallel.decoder.num_ranks * vision_work / decoder_work
    results = []
    for number in sorted({max(1, round(even * factor)) for factor in _TRIED_FACTORS}):
        vision = replace(run.parallel.vision, placement="dedicated", num_ranks=number)
        dedicated = replace(run, parallel=replace(run.parallel, vision=vision))
        simulated = Forecast(rows, dedicated, speeds).play(plan_balanced(rows, dedicated))
        results.append((number, simulated))
    return sorted(results, key=lambda result: result[1].seconds * len(result[1].spans))


class Forecast:
    """Expected times of one global batch on one grid."""

    def __init__(self, rows: Sequence[RowShape], run: RunConfig, speeds: Speeds) -> None:
        """Compute the time of each row.

        Args:
            rows: Rows of the global batch, in the order in which the decoder runs them.
            run: Sizes and degrees.
            speeds: Speeds of a device.
        """
        self._rows, self._run, self._speeds = rows, run, speeds
        self._cost: VisionCost = vision_cost(run.model.vision, run.parallel.vision)
        width = run.model.decoder.hidden_size
        flops = vision_flops(run.model.vision, width)
        self._patch_seconds = flops / (speeds.vision_tflops * 1e12)
        self._decoder_seconds = [self._row_seconds(row) for row in rows]

    def vision_seconds(self) -> float:
        """Return the time of one forward pass of vision over all pictures, on one device."""
        return sum(self._encode_seconds(picture) for row in self._rows for picture in row.pictures)

    def decoder_seconds(self) -> float:
        """Return the time of one forward pass of the decoder over all rows, on one device."""
        return sum(self._decoder_seconds) * self._run.model.decoder.num_layers

    @property
    def vision_passes(self) -> int:
        """Vision's work in forward passes: the first one, and those of the backward pass."""
        return 1 + self._vision_backward_passes if vision_learns(self._run) else 1

    @property
    def _vision_backward_passes(self) -> int:
        """Two, and one that encodes the chunk again, as is assumed with "auto"."""
        return 2 if self._run.parallel.vision.recompute == "off" else 3

    @property
    def decoder_passes(self) -> int:
        """The decoder's work in forward passes: backward is two, and recomputing layers one.

        Recomputing only a part of a layer counts as the whole, as an upper bound.
        """
        return 3 if self._run.training.recompute == "none" else 4

    def play(self, plan: StepPlan) -> Simulated:
        """Simulate a plan of these rows."""
        seconds = [sum(map(self._encode_seconds, chunk.pictures)) for chunk in plan.chunks]
        largest = self._largest_shares(plan)
        costs = StepCosts(
            encode=lambda chunk: seconds[chunk],
            vision_backward=lambda chunk: self._vision_backward_passes * seconds[chunk],
            decoder=self._pass_seconds,
            exchange=lambda exchange: largest[exchange],
        )
        return simulate(plan, self._run.parallel, self._num_micro_batches, costs)

    def play_on_first_stage(self) -> Simulated:
        """Simulate the step with the ViT as a part of the first pipeline stage, as a baseline.

        The ranks of that stage share their replica's pictures evenly, and recompute them for the
        backward pass, since the activations of a long video would not fit.
        """
        parallel = replace(
            self._run.parallel, vision=replace(self._run.parallel.vision, placement="colocated")
        )
        degrees = parallel.decoder
        passes = 3 if vision_learns(self._run) else 0

        def seconds(place: DecoderPlace, step: Pass) -> float:
            decoder = self._pass_seconds(place, step)
            if place.pipeline > 0 or step.virtual_stage > 0:
                return decoder
            row = self._rows[step.micro_batch * degrees.data + place.data]
            vision = sum(map(self._encode_seconds, row.pictures))
            share = vision / (degrees.tensor * degrees.context)
            return decoder + share * (1 if step.is_forward else passes)

        plan = StepPlan(chunks=(), transfers=(), exchanges=(), num_micro_batches=self._num_micro_batches)
        costs = StepCosts(
            encode=lambda _: 0.0,
            vision_backward=lambda _: 0.0,
            decoder=seconds,
            exchange=lambda _: 0.0,
        )
        return simulate(plan, parallel, self._num_micro_batches, costs)

    @property
    def _num_micro_batches(self) -> int:
        return len(self._rows) // self._run.parallel.decoder.data

    def _encode_seconds(self, picture: PictureSlot) -> float:
        return self._cost.of_frame(picture.num_patches) * self._patch_seconds

    def _row_seconds(self, row: RowShape) -> float:
        """Return the time of one layer's forward pass over a row, on one device."""
        decoder = self._run.model.decoder
        flops = self._run.data.row_tokens * token_flops(decoder)
        phase = self._run.training.row_phase(row.sizes.longest_path)
        flops += attention_flops(row.document_lengths, decoder, phase, row.num_earlier)
        return flops / (self._speeds.decoder_tflops * 1e12)

    def _pass_seconds(self, place: DecoderPlace, step: Pass) -> float:
        degrees, num_layers = self._run.parallel.decoder, self._run.model.decoder.num_layers
        layers = len(degrees.virtual_stage_layers(num_layers, place.pipeline, step.virtual_stage))
        layer = self._decoder_seconds[step.micro_batch * degrees.data + place.data]
        forward = layer * layers / (degrees.tensor * degrees.context)
        return forward if step.is_forward else forward * (self.decoder_passes - 1)

    def _largest_shares(self, plan: StepPlan) -> dict[Exchange, float]:
        """Return the time of each exchange: that of the rank that sends or receives most."""
        rows: dict[tuple[int, bool, int], int] = {}
        for transfer in plan.transfers:
            for is_source, rank in ((True, transfer.source), (False, transfer.destination)):
                key = (transfer.micro_batch, is_source, rank)
                rows[key] = rows.get(key, 0) + len(transfer.positions)
        most: dict[int, int] = {}
        for (micro_batch, _, _), count in rows.items():
            most[micro_batch] = max(most.get(micro_batch, 0), count)
        row_bytes = 2 * self._run.model.decoder.hidden_size
        speed = self._speeds.link_gigabytes_per_second * 1e9
        return {e: most[e.micro_batch] * row_bytes / speed for e in plan.exchanges}


def _slots(rows: Sequence[RowShape]) -> list[PictureSlot]:
    return [
        PictureSlot(
            row=number,
            index=index,
            start=slot.start,
            num_patches=slot.num_patches,
            num_tokens=slot.num_tokens,
        )
        for number, row in enumerate(rows)
        for index, slot in enumerate(row.pictures)
    ]


def _pictures_by_document(rows: Sequence[RowShape]) -> list[list[PictureSlot]]:
    """Return the pictures of each document that has any, in row order."""
    documents: list[list[PictureSlot]] = []
    slots = iter(_slots(rows))
    for row in rows:
        ends, end = [], 0
        for length in row.document_lengths:
            end += length
            ends.append(end)
        by_document: dict[int, list[PictureSlot]] = {}
        for _ in row.pictures:
            slot = next(slots)
            document = sum(e <= slot.start for e in ends)
            by_document.setdefault(document, []).append(slot)
        documents += by_document.values()
    return documents
