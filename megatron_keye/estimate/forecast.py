"""Estimates a step's time and the idle time of ranks, from a run and the sizes of its rows.

Times are executed FLOPs over an assumed speed, which is the weak point; the order of events is
exact, since it comes from the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_keye.config.run import RunConfig
from megatron_keye.data.placeholders import picture_slots
from megatron_keye.data.row import PackedRow
from megatron_keye.estimate.account import Passes, Work, picture_works, row_works
from megatron_keye.estimate.simulate import Simulated, StepCosts, simulate
from megatron_keye.plan.cost import derived_break_even, vision_cost
from megatron_keye.plan.order import Exchange, Pass
from megatron_keye.plan.places import DecoderPlace
from megatron_keye.plan.slots import RowSizes, balanced_order, plan_slots
from megatron_keye.plan.step import PictureSlot, StepPlan

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
    num_padding: int = 0
    """Tokens of the row that are padding, at its end and in its last document."""
    num_labels: int = 0
    """Tokens that have a label."""

    @property
    def sizes(self) -> RowSizes:
        """What its cost follows from."""
        return RowSizes(
            self.document_lengths,
            [picture.num_patches for picture in self.pictures],
            self.num_earlier,
            self.num_padding,
            self.num_labels,
        )


def shape_of(row: PackedRow, run: RunConfig) -> RowShape:
    """Return the sizes of a row.

    Raises:
        UserError: If its placeholders are not where its pictures go.
    """
    sizes = row.sizes
    return RowShape(
        document_lengths=tuple(np.asarray(sizes.lengths).tolist()),
        pictures=tuple(picture_slots([row], run)),
        num_earlier=tuple(np.asarray(sizes.num_earlier).tolist()),
        num_padding=sizes.num_padding,
        num_labels=sizes.num_labels,
    )


def balance_shapes(rows: Sequence[RowShape], run: RunConfig) -> list[RowShape]:
    """Return the rows in training's order."""
    return [rows[place] for place in balanced_order([row.sizes for row in rows], run)]


def plan_balanced(rows: Sequence[RowShape], run: RunConfig) -> StepPlan:
    """Return the plan that training makes for rows in this order."""
    return plan_slots(picture_slots_of(rows), len(rows), run)


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
    vision_work, decoder_work = forecast.vision_seconds(), forecast.decoder_seconds()
    if vision_work == 0:
        return []
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
        self._break_even = vision_cost(run.model.vision, run.parallel.vision).break_even_patches
        works = [row_works(run, row.sizes) for row in rows]
        self._layer_seconds = [self._decoder_passes(layer) for layer, _ in works]
        self._output_seconds = [self._decoder_passes(output) for _, output in works]

    def vision_seconds(self) -> float:
        """Return the time of vision's passes over all pictures, on one device."""
        pictures = [picture for row in self._rows for picture in row.pictures]
        return self._chunk_seconds(pictures).total

    def decoder_seconds(self) -> float:
        """Return the time of the decoder's passes over all rows, on one device."""
        num_layers = self._run.model.decoder.num_layers
        degrees = self._run.parallel.decoder
        rows = zip(self._layer_seconds, self._output_seconds, strict=True)
        of_ranks = sum(layer.total * num_layers + output.total for layer, output in rows)
        return of_ranks * degrees.tensor * degrees.context

    def play(self, plan: StepPlan) -> Simulated:
        """Simulate a plan of these rows."""
        seconds = [self._chunk_seconds(chunk.pictures) for chunk in plan.chunks]
        largest = self._largest_shares(plan)
        costs = StepCosts(
            encode=lambda chunk: seconds[chunk].forward,
            vision_backward=lambda chunk: _backward(seconds[chunk]),
            decoder=self._pass_seconds,
            exchange=lambda exchange: largest[exchange],
        )
        return simulate(plan, self._run.parallel, self._num_micro_batches, costs)

    def play_on_first_stage(self) -> Simulated:
        """Simulate the step with the ViT as a part of the first pipeline stage, as a baseline.

        The ranks of that stage share their replica's pictures evenly.
        """
        parallel = replace(
            self._run.parallel, vision=replace(self._run.parallel.vision, placement="colocated")
        )
        degrees = parallel.decoder
        vision = [self._chunk_seconds(row.pictures) for row in self._rows]

        def seconds(place: DecoderPlace, step: Pass) -> float:
            decoder = self._pass_seconds(place, step)
            if place.pipeline > 0 or step.virtual_stage > 0:
                return decoder
            of_row = vision[step.micro_batch * degrees.data + place.data]
            share = of_row.forward if step.is_forward else _backward(of_row)
            return decoder + share / (degrees.tensor * degrees.context)

        plan = StepPlan(chunks=(), transfers=(), exchanges=())
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

    def _chunk_seconds(self, pictures: Sequence[PictureSlot]) -> Passes:
        """Return the time of vision's passes over some pictures, on one device.

        Attention is as much slower or faster than linears as its measured break-even size says.
        """
        derived = derived_break_even(self._run.model.vision)
        works = picture_works(self._run, [picture.num_patches for picture in pictures])
        passes = Passes()
        for work in works:
            factor = derived / self._break_even if work.module == "vision.attention" else 1.0
            passes += work.executed_flops * factor
        return passes * (1 / (self._speeds.vision_tflops * 1e12))

    def _decoder_passes(self, works: Sequence[Work]) -> Passes:
        """Return the time of a rank's works, the mean over context ranks."""
        flops = sum((work.executed_flops for work in works), Passes())
        speed = self._speeds.decoder_tflops * 1e12 * self._run.parallel.decoder.context
        return flops * (1 / speed)

    def _pass_seconds(self, place: DecoderPlace, step: Pass) -> float:
        degrees, num_layers = self._run.parallel.decoder, self._run.model.decoder.num_layers
        row = step.micro_batch * degrees.data + place.data
        layers = degrees.virtual_stage_layers(num_layers, place.pipeline, step.virtual_stage)
        passes = self._layer_seconds[row] * len(layers)
        if layers.stop == num_layers:
            passes += self._output_seconds[row]
        return passes.forward if step.is_forward else _backward(passes)

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


def _backward(passes: Passes) -> float:
    """Return the time of a backward pass, with what it recomputes."""
    return passes.backward + passes.recomputed


def picture_slots_of(rows: Sequence[RowShape]) -> list[PictureSlot]:
    """Return all pictures of rows in this order, numbered."""
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
