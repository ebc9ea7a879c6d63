# SPDX-License-Identifier: Apache-2.0
"""Estimates a step's time and the idle time of ranks, from a run and the sizes of its rows.

Times are executed FLOPs over an assumed speed, which is the weak point; the order of events is
exact, since it comes from the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.parallel import DecoderParallel
from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account import Passes, Work, picture_works, row_works
from megatron_keye.estimate.simulate import Simulated, StepCosts, simulate
from megatron_keye.estimate.traffic import Links, exchange_seconds, hop_seconds
from megatron_keye.estimate.workload import (
    NO_PICTURES,
    BatchPictures,
    RowShape,
    StepWork,
    balance_shapes,
    plan_balanced,
)
from megatron_keye.plan.cost import derived_break_even, vision_cost
from megatron_keye.plan.order import Pass
from megatron_keye.plan.places import DecoderPlace

_TRIED_FACTORS = (0.8, 1.0, 1.25, 1.6)
"""Numbers of vision ranks to simulate, relative to the one that makes the work per rank equal."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Sustained speeds of one device; assumptions, to be replaced by measurements."""

    vision_tflops: float = 350.0
    """TFLOP/s of the ViT, in bf16."""
    decoder_tflops: float = 200.0
    """TFLOP/s of the decoder, experts and their all-to-all included."""
    links: Links = field(default_factory=Links)
    """Links between devices."""


def try_vision_ranks(
    rows: Sequence[RowShape], run: RunConfig, speeds: Speeds, *, shared_micro_batches: int = 0
) -> list[tuple[int, Simulated]]:
    """Simulate a batch with several numbers of dedicated vision ranks.

    Args:
        rows: Rows of the global batch, in any order.
        run: The run; its decoder grid is kept, its vision placement ignored.
        speeds: Speeds of a device.
        shared_micro_batches: As the setting of that name.

    Returns:
        Pairs of number and result, around the number at which vision and decoder ranks have equal
        work, fewest rank-seconds first. Empty for a batch without pictures.
    """
    forecast = Forecast(rows, run, speeds)
    vision_work, decoder_work = forecast.vision_seconds(), forecast.decoder_seconds()
    if vision_work == 0:
        return []
    num_micro_batches = len(rows) // run.parallel.decoder.data
    vision_work *= max(0, 1 - 2 * shared_micro_batches / num_micro_batches)
    even = run.parallel.decoder.num_ranks * vision_work / decoder_work
    results = [
        (number, play_dedicated(rows, run, speeds, number, shared_micro_batches))
        for number in sorted({max(1, round(even * factor)) for factor in _TRIED_FACTORS})
    ]
    return sorted(results, key=lambda result: result[1].seconds * result[1].num_ranks)


def play_dedicated(
    rows: Sequence[RowShape],
    run: RunConfig,
    speeds: Speeds,
    num_vision_ranks: int,
    shared_micro_batches: int,
) -> Simulated:
    """Simulate a batch, in training's order, with so many dedicated vision ranks."""
    vision = replace(
        run.parallel.vision,
        placement="dedicated",
        num_ranks=num_vision_ranks,
        shared_micro_batches=shared_micro_batches,
    )
    dedicated = replace(run, parallel=replace(run.parallel, vision=vision))
    balanced = balance_shapes(rows, dedicated)
    return Forecast(balanced, dedicated, speeds).play(plan_balanced(balanced, dedicated))


def play_best_dedicated(
    rows: Sequence[RowShape], run: RunConfig, speeds: Speeds, *, shared_micro_batches: int = 0
) -> Simulated:
    """Simulate a batch with the number of vision ranks that takes fewest rank-seconds.

    With more replicas than eight the number is found with the rows of some of them. Arguments are
    those of `try_vision_ranks`; without pictures one vision rank is idle.
    """
    degrees = run.parallel.decoder
    # Experts may span replicas; a part of these must still hold them all.
    data = next(n for n in range(min(8, degrees.data), degrees.data + 1) if _fits(degrees, n))
    part = replace(run, parallel=replace(run.parallel, decoder=replace(degrees, data=data)))
    of_part = rows[: len(rows) * data // degrees.data]
    tried = try_vision_ranks(of_part, part, speeds, shared_micro_batches=shared_micro_batches)
    if tried and data == degrees.data:
        return tried[0][1]
    number = max(1, round(tried[0][0] * degrees.data / data)) if tried else 1
    return play_dedicated(rows, run, speeds, number, shared_micro_batches)


def _fits(degrees: DecoderParallel, data: int) -> bool:
    return degrees.tensor * degrees.context * data % degrees.expert == 0


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
        self._pictures = BatchPictures.of_rows(rows)
        self._encode_seconds, self._vision_backward_seconds = self._vision_passes()
        works = [row_works(run, row.sizes) for row in rows]
        self._layer_seconds = [self._decoder_passes(layer) for layer, _ in works]
        self._output_seconds = [self._decoder_passes(output) for _, output in works]

    def vision_seconds(self) -> float:
        """Return the time of vision's passes over all pictures, on one device."""
        return float(self._encode_seconds.sum() + self._vision_backward_seconds.sum())

    def decoder_seconds(self) -> float:
        """Return the time of the decoder's passes over all rows, on one device."""
        num_layers = self._run.model.decoder.num_layers
        degrees = self._run.parallel.decoder
        rows = zip(self._layer_seconds, self._output_seconds, strict=True)
        of_ranks = sum(layer.total * num_layers + output.total for layer, output in rows)
        return of_ranks * degrees.tensor * degrees.context

    def play(self, work: StepWork) -> Simulated:
        """Simulate a plan of these rows."""
        forward, backward = (
            np.bincount(work.chunk_of_picture, seconds, minlength=len(work.ranks)).tolist()
            for seconds in (self._encode_seconds, self._vision_backward_seconds)
        )
        links = self._speeds.links
        exchanges = exchange_seconds(self._pictures, work, self._run, links)
        costs = StepCosts(
            encode=lambda chunk: forward[chunk],
            vision_backward=lambda chunk: backward[chunk],
            decoder=self._pass_seconds,
            exchange=lambda exchange: exchanges[exchange.micro_batch],
            hop=hop_seconds(self._run, links),
        )
        return simulate(work, self._run.parallel, costs, records_spans=False)

    def play_on_first_stage(self) -> Simulated:
        """Simulate the step with the ViT as a part of the first pipeline stage, as a baseline.

        The ranks of that stage share their replica's pictures evenly.
        """
        colocated = replace(
            self._run.parallel.vision, placement="colocated", num_ranks=0, shared_micro_batches=0
        )
        run = replace(self._run, parallel=replace(self._run.parallel, vision=colocated))
        degrees = run.parallel.decoder
        num_ranks = degrees.tensor * degrees.context
        rows, num_rows = self._pictures.rows, len(self._rows)
        forward, backward = (
            (np.bincount(rows, each, minlength=num_rows) / num_ranks).tolist()
            for each in (self._encode_seconds, self._vision_backward_seconds)
        )

        def seconds(place: DecoderPlace, step: Pass) -> float:
            decoder = self._pass_seconds(place, step)
            if place.pipeline > 0 or step.virtual_stage > 0:
                return decoder
            row = step.micro_batch * degrees.data + place.data
            return decoder + float((forward if step.is_forward else backward)[row])

        costs = StepCosts(
            encode=lambda _: 0.0,
            vision_backward=lambda _: 0.0,
            decoder=seconds,
            exchange=lambda _: 0.0,
            hop=hop_seconds(run, self._speeds.links),
        )
        nothing = [replace(row, pictures=NO_PICTURES) for row in self._rows]
        return simulate(plan_balanced(nothing, run), run.parallel, costs, records_spans=False)

    def _vision_passes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the time of each picture's forward and backward passes, on one device.

        Attention is as much slower or faster than linears as its measured break-even size says.
        """
        vision = self._run.model.vision
        cost = vision_cost(vision, self._run.parallel.vision)
        factor = derived_break_even(vision) / cost.break_even_patches
        sizes, places = np.unique(self._pictures.patches, return_inverse=True)
        of_sizes = []
        for size in sizes.tolist():
            flops = Passes()
            for work in picture_works(self._run, [size]):
                is_attention = work.module == "vision.attention"
                flops += work.executed_flops * (factor if is_attention else 1.0)
            of_sizes.append((flops.forward, _backward(flops)))
        seconds = np.array(of_sizes).reshape(-1, 2) / (self._speeds.vision_tflops * 1e12)
        return seconds[places, 0], seconds[places, 1]

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


def _backward(passes: Passes) -> float:
    """Return the time of a backward pass, with what it recomputes."""
    return passes.backward + passes.recomputed
