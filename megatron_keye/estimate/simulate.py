# SPDX-License-Identifier: Apache-2.0
"""Discrete-event simulation of a step from its plan: when each rank works, and when it waits.

Ranks follow the same plan, the same orders and the same choice of next work as training. Tensor
and context ranks of a stage run the decoder in lockstep and are one process there.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.estimate.clock import Clock, Event, Process
from megatron_keye.estimate.workload import StepWork
from megatron_keye.observe.span import Span, SpanName
from megatron_keye.plan.cursor import ExchangeCursor
from megatron_keye.plan.order import Exchange, Pass, next_work, pipeline_order
from megatron_keye.plan.places import (
    DecoderPlace,
    decoder_place,
    is_encoded_by_decoder,
)


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Durations of the parts of a step, in seconds."""

    encode: Callable[[int], float]
    """Decoding and encoding the chunk of this index."""
    vision_backward: Callable[[int], float]
    """Encoding the chunk of this index again, and its backward."""
    decoder: Callable[[DecoderPlace, Pass], float]
    """One pass on the first tensor and context rank of a stage, and so on those beside it."""
    exchange: Callable[[Exchange], float]
    """An exchange, once all ranks have started it."""
    hop: float = 0.0
    """From the end of a pass until the next stage has its output."""


@dataclass(kw_only=True)
class Simulated:
    """The timeline of a simulated step."""

    seconds: float = 0.0
    """Duration of the step."""
    busy_seconds: list[float]
    """Work of every rank."""
    spans: dict[int, list[Span]] = field(default_factory=dict)
    """Work of every rank, in order, where it was asked for."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the job."""
        return len(self.busy_seconds)

    def idle_share(self, rank: int) -> float:
        """Return the share of the step in which a rank did no work."""
        return 1 - self.busy_seconds[rank] / self.seconds

    @property
    def mean_idle_share(self) -> float:
        """Mean of `idle_share` over all ranks."""
        return 1 - float(np.mean(self.busy_seconds)) / self.seconds


def simulate(
    work: StepWork, parallel: ParallelConfig, costs: StepCosts, *, records_spans: bool = True
) -> Simulated:
    """Simulate one step on all ranks.

    Args:
        work: Chunks and exchanges of the step.
        parallel: Degrees and placement.
        costs: Durations.
        records_spans: Whether to return the spans, of which a large grid has millions.
    """
    step = _Step(work, parallel, costs, records_spans=records_spans)
    step.add_ranks()
    step.result.seconds = step.clock.run()
    return step.result


class _Step:
    """The behaviour of each kind of rank."""

    def __init__(
        self, work: StepWork, parallel: ParallelConfig, costs: StepCosts, *, records_spans: bool
    ) -> None:
        self.work, self.parallel, self.costs, self.clock = work, parallel, costs, Clock()
        self.result = Simulated(busy_seconds=[0.0] * parallel.num_ranks)
        self.records_spans = records_spans
        if records_spans:
            self.result.spans = {rank: [] for rank in range(parallel.num_ranks)}
        self.first, self.last = work.first_micro_batch.tolist(), work.last_micro_batch.tolist()
        self.has_pictures: list[list[bool]] = work.has_pictures.tolist()
        self.returns = any(exchange.kind == "gradients" for exchange in work.exchanges)
        self.exchanges = {exchange: Event() for exchange in work.exchanges}
        self.passes: defaultdict[tuple[bool, int, int, int], Event] = defaultdict(Event)
        self.stages: defaultdict[tuple[str, int, int], Event] = defaultdict(Event)
        self.chunks: list[list[int]] = [[] for _ in range(parallel.num_ranks)]
        for chunk, rank in enumerate(work.ranks.tolist()):
            self.chunks[rank].append(chunk)
        degrees = parallel.decoder
        self.orders = [
            pipeline_order(degrees, work.num_micro_batches, stage)
            for stage in range(degrees.pipeline)
        ]
        self.is_around = [
            is_encoded_by_decoder(parallel.vision, micro_batch, work.num_micro_batches)
            for micro_batch in range(work.num_micro_batches)
        ]

    def add_ranks(self) -> None:
        """Start every process: of ranks that encode, and of one rank for each stage."""
        num_decoder = self.parallel.decoder.num_ranks
        for rank in range(self.parallel.num_ranks):
            if rank >= num_decoder:
                self.clock.add(self._encode_beside_the_decoder(rank))
                continue
            place = decoder_place(self.parallel.decoder, rank)
            if self.parallel.vision.decoder_encodes or _leads(place):
                self.clock.add(self._encode_around_the_decoder(rank, place))

    def _encode_beside_the_decoder(self, rank: int) -> Process:
        to_encode = deque(self.chunks[rank])
        backwards = deque(self.chunks[rank] if self.returns else [])
        cursor = self._cursor(rank, self.work.exchanges)
        self._start_ready(cursor, to_encode)
        while True:
            has_gradients = bool(backwards) and all(
                map(self.clock.has_happened, self._gradients(backwards[0]))
            )
            next_kind = next_work(
                num_to_encode=len(to_encode),
                num_backwards=len(backwards),
                num_ahead=self._num_ahead(cursor) if has_gradients else 0,
                has_gradients=has_gradients,
            )
            if next_kind == "nothing":
                return
            if next_kind == "encode":
                yield self._encode(rank, to_encode[0])
                to_encode.popleft()
                self._start_ready(cursor, to_encode)
            else:
                yield from self._gradients(backwards[0])
                yield self._backward(rank, backwards.popleft())

    def _encode_around_the_decoder(self, rank: int, place: DecoderPlace) -> Process:
        degrees, to_encode = self.parallel.decoder, deque(self.chunks[rank])
        order = [e for e in self.work.exchanges if _leads(place) or self.is_around[e.micro_batch]]
        cursor = self._cursor(rank, order)
        self._start_ready(cursor, to_encode)
        while to_encode:
            yield self._encode(rank, to_encode[0])
            to_encode.popleft()
            self._start_ready(cursor, to_encode)
        stage = (place.data, place.pipeline)
        together, ended = self.stages["begin", *stage], self.stages["end", *stage]
        num_ranks = degrees.tensor * degrees.context
        self.clock.arrive(together, num_ranks if self.parallel.vision.decoder_encodes else 1)
        if _leads(place):
            yield together
            yield from self._run_decoder(rank, place, cursor)
            self.clock.trigger(ended)
        yield ended
        cursor.allow_all()
        self._start_ready(cursor, to_encode)
        for chunk in self.chunks[rank] if self.returns else []:
            yield from self._gradients(chunk)
            yield self._backward(rank, chunk)

    def _run_decoder(self, rank: int, place: DecoderPlace, cursor: ExchangeCursor) -> Process:
        degrees = self.parallel.decoder
        last = degrees.pipeline * degrees.virtual_stages - 1
        beside = self._ranks_beside(place)
        for step in self.orders[place.pipeline]:
            virtual = step.virtual_stage * degrees.pipeline + place.pipeline
            if step.is_forward and virtual == 0:
                yield from self._features(cursor, place.data, step.micro_batch)
            elif step.is_forward:
                yield self.passes[True, virtual - 1, step.micro_batch, place.data]
            elif virtual < last:
                yield self.passes[False, virtual + 1, step.micro_batch, place.data]
            seconds = self.costs.decoder(place, step)
            name: SpanName = "forward" if step.is_forward else "backward"
            yield self._begin(beside, name, step, seconds)
            done = self.passes[step.is_forward, virtual, step.micro_batch, place.data]
            self.clock.trigger(done, self.costs.hop)
            gradients = Exchange("gradients", step.micro_batch)
            is_first = not step.is_forward and virtual == 0
            if is_first and gradients in self.exchanges and not self.is_around[step.micro_batch]:
                self._start_through(cursor, gradients)

    def _ranks_beside(self, place: DecoderPlace) -> Sequence[int]:
        """Return the ranks of a stage of one replica, which are in lockstep."""
        degrees = self.parallel.decoder
        size = degrees.tensor * degrees.context
        first = (place.pipeline * degrees.data + place.data) * size
        return range(first, first + size)

    def _features(self, cursor: ExchangeCursor, replica: int, micro_batch: int) -> Process:
        exchange = Exchange("features", micro_batch)
        if exchange in self.exchanges:
            self._start_through(cursor, exchange)
            if self.has_pictures[micro_batch][replica]:
                yield self.exchanges[exchange]

    def _begin(
        self, ranks: Sequence[int], name: SpanName, what: int | Pass, seconds: float
    ) -> float:
        """Note that ranks begin work now, and return how long it lasts."""
        for rank in ranks:
            self.result.busy_seconds[rank] += seconds
        if self.records_spans:
            label = f"chunk {what}"
            if isinstance(what, Pass):
                label = f"micro-batch {what.micro_batch}, virtual stage {what.virtual_stage}"
            now = self.clock.now
            span = Span(name=name, label=label, start=now, end=now + seconds)
            for rank in ranks:
                self.result.spans[rank].append(span)
        return seconds

    def _encode(self, rank: int, chunk: int) -> float:
        return self._begin((rank,), "encode", chunk, self.costs.encode(chunk))

    def _backward(self, rank: int, chunk: int) -> float:
        return self._begin((rank,), "vision", chunk, self.costs.vision_backward(chunk))

    def _gradients(self, chunk: int) -> list[Event]:
        needed = range(self.first[chunk], self.last[chunk] + 1)
        exchanges = (Exchange("gradients", micro_batch) for micro_batch in needed)
        return [self.exchanges[exchange] for exchange in exchanges if exchange in self.exchanges]

    def _cursor(self, rank: int, order: Sequence[Exchange]) -> ExchangeCursor:
        return ExchangeCursor(
            order, self.parallel, rank, num_micro_batches=self.work.num_micro_batches
        )

    def _num_ahead(self, cursor: ExchangeCursor) -> int:
        return sum(
            e.kind == "features" and not self.clock.has_happened(self.exchanges[e])
            for e in cursor.started
        )

    def _start_through(self, cursor: ExchangeCursor, exchange: Exchange) -> None:
        cursor.allow_through(exchange)
        self._start_ready(cursor, ())

    def _start_ready(self, cursor: ExchangeCursor, to_encode: Sequence[int]) -> None:
        """Start the exchanges that are allowed and need none of the chunks still to be encoded."""
        # Chunks are encoded in the order of micro-batches, so that the next one needs the first.
        missing = self.first[to_encode[0]] if to_encode else self.work.num_micro_batches

        def is_ready(exchange: Exchange) -> bool:
            return exchange.kind == "gradients" or exchange.micro_batch < missing

        for exchange in cursor.take_ready(is_ready):
            num_expected = self._num_starting(self.is_around[exchange.micro_batch])
            self.clock.arrive(
                self.exchanges[exchange], num_expected, self.costs.exchange(exchange)
            )

    def _num_starting(self, is_around: bool) -> int:
        """Return how many processes start an exchange: each for its own rank, or for a stage."""
        if is_around:
            return self.parallel.decoder.num_ranks
        return self.parallel.decoder.data + self.parallel.vision.num_ranks


def _leads(place: DecoderPlace) -> bool:
    """Return whether a rank is the first of those in lockstep, whose process runs the decoder."""
    return place.tensor == 0 and place.context == 0
