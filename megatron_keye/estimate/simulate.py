"""Discrete-event simulation of a step from its plan: when each rank works, and when it waits.

Every rank is a generator that yields work or an event to wait for. It follows the same plan, the
same orders and the same choice of next work as training.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from dataclasses import dataclass, field

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.observe.span import Span, SpanName
from megatron_keye.plan.cursor import ExchangeCursor
from megatron_keye.plan.order import Exchange, Pass, next_work, pipeline_order
from megatron_keye.plan.places import DecoderPlace, decoder_place, transport_ranks
from megatron_keye.plan.step import StepPlan


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Durations of the parts of a step, in seconds."""

    encode: Callable[[int], float]
    """Decoding and encoding the chunk of this index."""
    vision_backward: Callable[[int], float]
    """Encoding the chunk of this index again, and its backward."""
    decoder: Callable[[DecoderPlace, Pass], float]
    """One pass on one rank."""
    exchange: Callable[[Exchange], float]
    """An exchange, once all ranks have started it."""


@dataclass(frozen=True)
class Simulated:
    """The timeline of a simulated step."""

    seconds: float
    """Duration of the step."""
    spans: dict[int, list[Span]]
    """Work of every rank, in order."""

    def idle_share(self, rank: int) -> float:
        """Return the share of the step in which a rank did no work."""
        return 1 - sum(span.end - span.start for span in self.spans[rank]) / self.seconds

    @property
    def mean_idle_share(self) -> float:
        """Mean of `idle_share` over all ranks."""
        return sum(map(self.idle_share, self.spans)) / len(self.spans)


@dataclass(frozen=True)
class _Work:
    name: SpanName
    label: str
    seconds: float


_Rank = Generator[_Work | Hashable, None, None]
"""Yields work, which lasts for its time, or an event, which it waits for."""


def simulate(
    plan: StepPlan, parallel: ParallelConfig, num_micro_batches: int, costs: StepCosts
) -> Simulated:
    """Simulate one step on all ranks.

    Args:
        plan: The step's plan.
        parallel: Degrees and placement.
        num_micro_batches: Micro-batches of a replica.
        costs: Durations.
    """
    clock = _Clock()
    step = _Step(plan, parallel, num_micro_batches, costs, clock)
    for rank in range(parallel.num_ranks):
        clock.add(rank, step.run(rank))
    seconds = clock.run()
    return Simulated(seconds=seconds, spans=clock.spans)


@dataclass
class _Clock:
    """Event loop: resumes the ranks' generators in the order of their times."""

    now: float = 0.0
    spans: dict[int, list[Span]] = field(default_factory=dict)
    _queue: list[tuple[float, int, int]] = field(default_factory=list)
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _triggered: set[Hashable] = field(default_factory=set)
    _waiting: dict[Hashable, list[int]] = field(default_factory=dict)
    _arrivals: dict[Hashable, int] = field(default_factory=dict)
    _delayed: dict[int, Hashable] = field(default_factory=dict)
    _count: int = 0

    def add(self, rank: int, steps: _Rank) -> None:
        self._ranks[rank], self.spans[rank] = steps, []
        self._push(0.0, rank)

    def run(self) -> float:
        """Run until nothing is left, and return the time of the end."""
        while self._queue:
            self.now, _, who = heapq.heappop(self._queue)
            if who in self._delayed:
                self.trigger(self._delayed.pop(who))
            else:
                self._resume(who)
        assert not self._ranks, f"ranks {sorted(self._ranks)} are deadlocked: {self._waiting}"
        return self.now

    def is_triggered(self, event: Hashable) -> bool:
        return event in self._triggered

    def trigger(self, event: Hashable, delay: float = 0.0) -> None:
        """Resume the ranks that wait for an event, now or later."""
        if delay > 0:
            self._delayed[-self._count - 1] = event
            self._push(self.now + delay, -self._count - 1)
            return
        self._triggered.add(event)
        for rank in self._waiting.pop(event, []):
            self._push(self.now, rank)

    def arrive(self, event: Hashable, expected: int, delay: float = 0.0) -> None:
        """Count an arrival; the last one triggers the event."""
        self._arrivals[event] = self._arrivals.get(event, 0) + 1
        if self._arrivals[event] == expected:
            self.trigger(event, delay)

    def _resume(self, rank: int) -> None:
        for wanted in self._ranks[rank]:
            if isinstance(wanted, _Work):
                end = self.now + wanted.seconds
                self.spans[rank].append(
                    Span(name=wanted.name, label=wanted.label, start=self.now, end=end)
                )
                self._push(end, rank)
                return
            if wanted not in self._triggered:
                self._waiting.setdefault(wanted, []).append(rank)
                return
        del self._ranks[rank]

    def _push(self, when: float, who: int) -> None:
        self._count += 1
        heapq.heappush(self._queue, (when, self._count, who))


class _Step:
    """The behaviour of each kind of rank."""

    def __init__(
        self,
        plan: StepPlan,
        parallel: ParallelConfig,
        num_micro_batches: int,
        costs: StepCosts,
        clock: _Clock,
    ) -> None:
        self.plan, self.parallel, self.costs, self.clock = plan, parallel, costs, clock
        self.num_micro_batches = num_micro_batches
        self.order = list(plan.exchanges)
        self.transport_ranks = transport_ranks(parallel)
        self.is_dedicated = parallel.vision.placement == "dedicated"
        self.cursors = {
            rank: ExchangeCursor(
                plan.exchanges, parallel, rank, num_micro_batches=num_micro_batches
            )
            for rank in self.transport_ranks
        }
        self.chunks: dict[int, list[int]] = {rank: [] for rank in range(parallel.num_ranks)}
        for index, chunk in enumerate(plan.chunks):
            self.chunks[chunk.vision_rank].append(index)

    def run(self, rank: int) -> _Rank:
        if rank >= self.parallel.decoder.num_ranks:
            return self._encode_beside_the_decoder(rank)
        return self._encode_around_the_decoder(rank)

    def _encode_beside_the_decoder(self, rank: int) -> _Rank:
        returns = any(exchange.kind == "gradients" for exchange in self.order)
        to_encode = deque(self.chunks[rank])
        backwards = deque(self.chunks[rank] if returns else [])
        self._start_ready(rank, to_encode)
        while True:
            features = [e for e in self.cursors[rank].started if e.kind == "features"]
            work = next_work(
                num_to_encode=len(to_encode),
                num_backwards=len(backwards),
                num_ahead=sum(not self.clock.is_triggered(e) for e in features),
                has_gradients=bool(backwards)
                and all(map(self.clock.is_triggered, self._gradients(backwards[0]))),
            )
            if work == "nothing":
                return
            if work == "encode":
                yield self._encode(to_encode[0])
                to_encode.popleft()
                self._start_ready(rank, to_encode)
            else:
                yield from self._gradients(backwards[0])
                yield self._backward(backwards.popleft())

    def _encode_around_the_decoder(self, rank: int) -> _Rank:
        place = decoder_place(self.parallel.decoder, rank)
        to_encode = deque(self.chunks[rank])
        is_transporting = rank in self.cursors
        if is_transporting:
            self._start_ready(rank, to_encode)
        while to_encode:
            yield self._encode(to_encode[0])
            to_encode.popleft()
            self._start_ready(rank, to_encode)
        yield from self._run_decoder(rank, place)
        if not is_transporting:
            return
        self.cursors[rank].allow_all()
        self._start_ready(rank, to_encode)
        for chunk in self.chunks[rank]:
            gradients = self._gradients(chunk)
            if gradients:
                yield from gradients
                yield self._backward(chunk)

    def _run_decoder(self, rank: int, place: DecoderPlace) -> _Rank:
        degrees = self.parallel.decoder
        # Tensor and context ranks of a stage run in lockstep.
        together = ("decoder", place.data, place.pipeline)
        self.clock.arrive(together, degrees.tensor * degrees.context)
        yield together
        last = degrees.pipeline * degrees.virtual_stages - 1
        peers = (place.data, place.tensor, place.context)
        for step in pipeline_order(degrees, self.num_micro_batches, place.pipeline):
            virtual = step.virtual_stage * degrees.pipeline + place.pipeline
            if step.is_forward and virtual == 0:
                yield from self._features(rank, step.micro_batch)
            elif step.is_forward:
                yield (True, virtual - 1, step.micro_batch, peers)
            elif virtual < last:
                yield (False, virtual + 1, step.micro_batch, peers)
            name: SpanName = "forward" if step.is_forward else "backward"
            label = f"micro-batch {step.micro_batch}, virtual stage {step.virtual_stage}"
            yield _Work(name, label, self.costs.decoder(place, step))
            self.clock.trigger((step.is_forward, virtual, step.micro_batch, peers))
            gradients = Exchange("gradients", step.micro_batch)
            is_returned = not step.is_forward and virtual == 0 and gradients in self.order
            if is_returned and self.is_dedicated:
                self._start_through(rank, gradients)

    def _features(self, rank: int, micro_batch: int) -> _Rank:
        exchange = Exchange("features", micro_batch)
        if exchange in self.order:
            self._start_through(rank, exchange)
            if self.plan.receives(rank, micro_batch):
                yield exchange

    def _encode(self, chunk: int) -> _Work:
        return _Work("encode", f"chunk {chunk}", self.costs.encode(chunk))

    def _backward(self, chunk: int) -> _Work:
        return _Work("vision", f"chunk {chunk}", self.costs.vision_backward(chunk))

    def _gradients(self, chunk: int) -> list[Exchange]:
        needed = {transfer.micro_batch for transfer in self.plan.transfers_of(chunk)}
        exchanges = [Exchange("gradients", micro_batch) for micro_batch in sorted(needed)]
        return [exchange for exchange in exchanges if exchange in self.order]

    def _start_through(self, rank: int, exchange: Exchange) -> None:
        self.cursors[rank].allow_through(exchange)
        self._start_ready(rank, ())

    def _start_ready(self, rank: int, to_encode: Iterable[int]) -> None:
        """Start the exchanges that are allowed and need none of the chunks still to be encoded."""
        missing = {t.micro_batch for chunk in to_encode for t in self.plan.transfers_of(chunk)}

        def is_ready(exchange: Exchange) -> bool:
            return exchange.kind == "gradients" or exchange.micro_batch not in missing

        for exchange in self.cursors[rank].take_ready(is_ready):
            self.clock.arrive(exchange, len(self.transport_ranks), self.costs.exchange(exchange))
