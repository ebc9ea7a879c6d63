"""Estimates a step's time and the idle time of ranks, from a run and the sizes of its rows.

Times are FLOPs over an assumed speed, which is the weak point; the order of events is exact, since
it comes from the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from megatron_keye.config.parallel import DecoderParallel
from megatron_keye.config.run import RunConfig
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
from megatron_keye.plan.cost import attention_flops, token_flops, vision_cost, vision_flops
from megatron_keye.plan.order import Pass
from megatron_keye.plan.places import DecoderPlace
from megatron_keye.plan.slots import vision_learns

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
    vision_work = forecast.vision_seconds() * forecast.vision_passes
    if vision_work == 0:
        return []
    num_micro_batches = len(rows) // run.parallel.decoder.data
    vision_work *= max(0, 1 - 2 * shared_micro_batches / num_micro_batches)
    decoder_work = forecast.decoder_seconds() * forecast.decoder_passes
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
        flops = vision_flops(run.model.vision, run.model.decoder.hidden_size)
        self._encode_seconds = (
            vision_cost(run.model.vision, run.parallel.vision).of_frames(self._pictures.patches)
            * flops
            / (speeds.vision_tflops * 1e12)
        )
        self._decoder_seconds = [self._row_seconds(row) for row in rows]

    def vision_seconds(self) -> float:
        """Return the time of one forward pass of vision over all pictures, on one device."""
        return float(self._encode_seconds.sum())

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

    def play(self, work: StepWork) -> Simulated:
        """Simulate a plan of these rows."""
        chunks = work.chunk_of_picture
        seconds = np.bincount(chunks, self._encode_seconds, minlength=len(work.ranks)).tolist()
        links, passes = self._speeds.links, self._vision_backward_passes
        exchanges = exchange_seconds(self._pictures, work, self._run, links)
        costs = StepCosts(
            encode=lambda chunk: seconds[chunk],
            vision_backward=lambda chunk: passes * seconds[chunk],
            decoder=self._pass_seconds,
            exchange=lambda exchange: exchanges[exchange.micro_batch],
            hop=hop_seconds(self._run, links),
        )
        return simulate(work, self._run.parallel, costs, records_spans=False)

    def play_on_first_stage(self) -> Simulated:
        """Simulate the step with the ViT as a part of the first pipeline stage, as a baseline.

        The ranks of that stage share their replica's pictures evenly, and recompute them for the
        backward pass, since the activations of a long video would not fit.
        """
        colocated = replace(
            self._run.parallel.vision, placement="colocated", num_ranks=0, shared_micro_batches=0
        )
        run = replace(self._run, parallel=replace(self._run.parallel, vision=colocated))
        degrees = run.parallel.decoder
        passes = 3 if vision_learns(run) else 0
        of_rows = np.bincount(self._pictures.rows, self._encode_seconds, minlength=len(self._rows))
        shares = (of_rows / (degrees.tensor * degrees.context)).tolist()

        def seconds(place: DecoderPlace, step: Pass) -> float:
            decoder = self._pass_seconds(place, step)
            if place.pipeline > 0 or step.virtual_stage > 0:
                return decoder
            share = shares[step.micro_batch * degrees.data + place.data]
            return decoder + share * (1 if step.is_forward else passes)

        costs = StepCosts(
            encode=lambda _: 0.0,
            vision_backward=lambda _: 0.0,
            decoder=seconds,
            exchange=lambda _: 0.0,
            hop=hop_seconds(run, self._speeds.links),
        )
        nothing = [replace(row, pictures=NO_PICTURES) for row in self._rows]
        return simulate(plan_balanced(nothing, run), run.parallel, costs, records_spans=False)

    def _row_seconds(self, row: RowShape) -> float:
        """Return the time of one layer's forward pass over a row, on one device."""
        decoder = self._run.model.decoder
        flops = self._run.data.row_tokens * token_flops(decoder)
        phase = self._run.training.row_phase(row.sizes.longest_path)
        flops += attention_flops(row.document_lengths, decoder, phase, row.num_earlier)
        return flops / (self._speeds.decoder_tflops * 1e12)

    def _pass_seconds(self, place: DecoderPlace, step: Pass) -> float:
        degrees = self._run.parallel.decoder
        layers = self._layers[place.pipeline][step.virtual_stage]
        layer = self._decoder_seconds[step.micro_batch * degrees.data + place.data]
        forward = layer * layers / (degrees.tensor * degrees.context)
        return forward if step.is_forward else forward * (self.decoder_passes - 1)

    @cached_property
    def _layers(self) -> list[list[int]]:
        """Layers of each virtual stage, by pipeline stage."""
        degrees, num_layers = self._run.parallel.decoder, self._run.model.decoder.num_layers
        return [
            [
                len(degrees.virtual_stage_layers(num_layers, stage, virtual))
                for virtual in range(degrees.virtual_stages)
            ]
            for stage in range(degrees.pipeline)
        ]
