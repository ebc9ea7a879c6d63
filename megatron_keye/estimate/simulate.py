"""Plays a step from its plan, without computing anything: who works when, who waits for whom.

Every rank is a generator that asks for time to pass or for an event to happen. It follows the
same plan, the same orders and the same choice of next work as training does.
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
    """How long everything takes, in seconds."""

    encode: Callable[[int], float]
    """A chunk of pictures, decoded and encoded."""
    vision_backward: Callable[[int], float]
    """A chunk of pictures, encoded again and backward."""
    decoder: Callable[[DecoderPlace, Pass], float]
    """One pass of one rank."""
    exchange: Callable[[Exchange], float]
    """An exchange, once all ranks have started it."""
    optimizer: float = 0.0
    """From the last gradient to the updated weights."""


@dataclass(frozen=True)
class Simulated:
    """What came of a step."""

    seconds: float
    """From its start to its end."""
    spans: dict[int, list[Span]]
    """Work of every rank, in order."""

    def idle_share(self, rank: int) -> float:
        """Return which part of the step a rank had nothing to do."""
        return 1 - sum(span.end - span.start for span in self.spans[rank]) / self.seconds

    @property
    def mean_idle_share(self) -> float:
        """Mean over all ranks."""
        return sum(map(self.idle_share, self.spans)) / len(self.spans)


@dataclass(frozen=True)
class _Work:
    phase: SpanName
    label: str
    seconds: float


_Rank = Generator[_Work | Hashable, None, None]
"""Yields work, which takes time, or an event, which it waits for."""


def simulate(
    plan: StepPlan, parallel: ParallelConfig, num_micro_batches: int, costs: StepCosts
) -> Simulated:
    """Play one step on all ranks.

    Args:
        plan: The step's plan.
        parallel: Degrees and placement.
        num_micro_batches: Micro-batches of a replica.
        costs: Times.
    """
    clock = _Clock()
    step = _Step(plan, parallel, num_micro_batches, costs, clock)
    for rank in range(parallel.num_ranks):
        clock.add(rank, step.run(rank))
    seconds = clock.run()
    return Simulated(seconds=seconds, spans=clock.spans)


@dataclass
class _Clock:
    """Runs generators in the order of their times."""

    now: float = 0.0
    spans: dict[int, list[Span]] = field(default_factory=dict)
    _due: list[tuple[float, int, int]] = field(default_factory=list)
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _happened: set[Hashable] = field(default_factory=set)
    _waiting: dict[Hashable, list[int]] = field(default_factory=dict)
    _arrived: dict[Hashable, int] = field(default_factory=dict)
    _later: dict[int, Hashable] = field(default_factory=dict)
    _count: int = 0

    def add(self, rank: int, steps: _Rank) -> None:
        self._ranks[rank], self.spans[rank] = steps, []
        self._push(0.0, rank)

    def run(self) -> float:
        """Run until nothing is left; the time at which it ended."""
        while self._due:
            self.now, _, who = heapq.heappop(self._due)
            if who in self._later:
                self.happen(self._later.pop(who))
            else:
                self._resume(who)
        assert not self._ranks, f"ranks {sorted(self._ranks)} wait for ever: {self._waiting}"
        return self.now

    def has_happened(self, event: Hashable) -> bool:
        return event in self._happened

    def happen(self, event: Hashable, after: float = 0.0) -> None:
        """Let an event happen, now or later."""
        if after > 0:
            self._later[-self._count - 1] = event
            self._push(self.now + after, -self._count - 1)
            return
        self._happened.add(event)
        for rank in self._waiting.pop(event, []):
            self._push(self.now, rank)

    def arrive(self, event: Hashable, expected: int, after: float = 0.0) -> None:
        """Count an arrival; with the last one the event happens."""
        self._arrived[event] = self._arrived.get(event, 0) + 1
        if self._arrived[event] == expected:
            self.happen(event, after)

    def _resume(self, rank: int) -> None:
        for wanted in self._ranks[rank]:
            if isinstance(wanted, _Work):
                end = self.now + wanted.seconds
                self.spans[rank].append(
                    Span(name=wanted.phase, label=wanted.label, start=self.now, end=end)
                )
                self._push(end, rank)
                return
            if wanted not in self._happened:
                self._waiting.setdefault(wanted, []).append(rank)
                return
        del self._ranks[rank]

    def _push(self, when: float, who: int) -> None:
        self._count += 1
        heapq.heappush(self._due, (when, self._count, who))


class _Step:
    """What each kind of rank does."""

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
            rank: ExchangeCursor(plan.exchanges, parallel, rank) for rank in self.transport_ranks
        }
        self.mine: dict[int, list[int]] = {rank: [] for rank in range(parallel.num_ranks)}
        for number, chunk in enumerate(plan.chunks):
            self.mine[chunk.vision_rank].append(number)

    def run(self, rank: int) -> _Rank:
        if rank >= self.parallel.decoder.num_ranks:
            yield from self._encode_beside_the_decoder(rank)
        else:
            yield from self._encode_around_the_decoder(rank)
        self.clock.arrive("optimizer", self.parallel.num_ranks)
        yield "optimizer"
        if self.costs.optimizer:
            yield _Work("optimizer", "", self.costs.optimizer)

    def _encode_beside_the_decoder(self, rank: int) -> _Rank:
        returns = any(exchange.kind == "gradients" for exchange in self.order)
        to_encode = deque(self.mine[rank])
        to_return = deque(self.mine[rank] if returns else [])
        self._start_ready(rank, to_encode)
        while True:
            features = [e for e in self.cursors[rank].started if e.kind == "features"]
            work = next_work(
                num_to_encode=len(to_encode),
                num_to_return=len(to_return),
                num_ahead=sum(not self.clock.has_happened(e) for e in features),
                has_gradients=bool(to_return)
                and all(map(self.clock.has_happened, self._gradients(to_return[0]))),
            )
            if work == "nothing":
                return
            if work == "encode":
                yield self._encode(to_encode[0])
                to_encode.popleft()
                self._start_ready(rank, to_encode)
            else:
                yield from self._gradients(to_return[0])
                yield self._backward(to_return.popleft())

    def _encode_around_the_decoder(self, rank: int) -> _Rank:
        place = decoder_place(self.parallel.decoder, rank)
        to_encode = deque(self.mine[rank])
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
        for chunk in self.mine[rank]:
            gradients = self._gradients(chunk)
            if gradients:
                yield from gradients
                yield self._backward(chunk)

    def _run_decoder(self, rank: int, place: DecoderPlace) -> _Rank:
        degrees = self.parallel.decoder
        # Tensor and context neighbours work in step with each other.
        together = ("decoder", place.data, place.pipeline)
        self.clock.arrive(together, degrees.tensor * degrees.context)
        yield together
        last = degrees.pipeline * degrees.virtual_stages - 1
        peers = (place.data, place.tensor, place.context)
        for step in pipeline_order(degrees, self.num_micro_batches, place.pipeline):
            part = step.virtual_stage * degrees.pipeline + place.pipeline
            if step.is_forward and part == 0:
                yield from self._features(rank, step.micro_batch)
            elif step.is_forward:
                yield (True, part - 1, step.micro_batch, peers)
            elif part < last:
                yield (False, part + 1, step.micro_batch, peers)
            name: SpanName = "forward" if step.is_forward else "backward"
            label = f"micro-batch {step.micro_batch}, virtual stage {step.virtual_stage}"
            yield _Work(name, label, self.costs.decoder(place, step))
            self.clock.happen((step.is_forward, part, step.micro_batch, peers))
            gradients = Exchange("gradients", step.micro_batch)
            is_returned = not step.is_forward and part == 0 and gradients in self.order
            if is_returned and self.is_dedicated and self.plan.receives(rank, step.micro_batch):
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
        """Start what is allowed and needs no chunk that is still to be encoded."""
        missing = {s.micro_batch for chunk in to_encode for s in self.plan.transfers_of(chunk)}

        def has_part(exchange: Exchange) -> bool:
            return exchange.kind == "gradients" or exchange.micro_batch not in missing

        for exchange in self.cursors[rank].take_ready(has_part):
            self.clock.arrive(exchange, len(self.transport_ranks), self.costs.exchange(exchange))
