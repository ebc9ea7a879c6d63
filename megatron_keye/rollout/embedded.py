# SPDX-License-Identifier: Apache-2.0
"""The engine inside the training stack: its modules, its kernels, its grid; a cache beside them.

All ranks take the same requests and know all drawn tokens, so each computes the same schedule for
all replicas, and their passes meet without a word about what comes next.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from megatron_keye.config.run import RunConfig
from megatron_keye.decoder.row import RowMeter
from megatron_keye.model import KeyeModel
from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.parallel.grid import Grid
from megatron_keye.rollout.cache import allocate, check_cache, count_pages
from megatron_keye.rollout.exchange import Drawn, tell_drawn, tell_routes
from megatron_keye.rollout.new_tokens import RankCache, packed_pieces
from megatron_keye.rollout.prefill import Prefill
from megatron_keye.rollout.refit import Refit
from megatron_keye.rollout.replayed import check_graphs
from megatron_keye.rollout.replica import Replica
from megatron_keye.rollout.request import Completion, NewToken, Request
from megatron_keye.rollout.scheduler import ReplicaScheduler, ReplicaTick
from megatron_keye.training.chunk_encoder import PatchSource


class EmbeddedEngine:
    """Answers requests with the model of these ranks."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: KeyeModel,
        *,
        source: PatchSource | None,
        device: torch.device,
        meter: RowMeter | None = None,
        heartbeat: Heartbeat | None = None,
        refit: Refit | None = None,
        notes_routes: bool = False,
    ) -> None:
        """Prepare; the cache takes its memory when answers are wanted.

        Args:
            run: A run whose grid generates (`generating_run`).
            grid: Groups of this rank.
            model: This rank's modules.
            source: Supplies the patches of pictures, on ranks that encode; None on others.
            device: Where this rank computes.
            meter: Receives the layers' measurements.
            heartbeat: Told of each tick; by default one that nobody reads.
            refit: Brings the newest weights, where the modules are not those that learn.
            notes_routes: Whether answers say to which experts their tokens went.

        Raises:
            UserError: For CUDA graphs of layers that they cannot hold, or a cache of numbers that
                the GPU lacks.
        """
        degrees = run.parallel.decoder
        assert degrees.pipeline == degrees.context == 1, "a generating grid has neither axis"
        if grid.decoder is not None:
            check_graphs(run, model.stages[0].module, device)
            check_cache(run, device)
        self.version = 0
        """Of the weights that answer."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._run, self._grid, self._model, self._device = run, grid, model, device
        self._refit, self._notes_routes = refit, notes_routes
        self._meter = meter or RowMeter()
        self._heartbeat = heartbeat or Heartbeat()
        self._prefill = Prefill(run, grid, model, source, device, self._heartbeat)
        self._schedulers: list[ReplicaScheduler] = []
        self._is_answering = False
        self._num_pages = 0
        self._replica: Replica | None = None

    @property
    def num_used_pages(self) -> int:
        """Pages that sequences hold, over all replicas."""
        return sum(scheduler.num_used_pages for scheduler in self._schedulers)

    def wake(self) -> None:
        """Take memory for weights, and for the cache what there is then, if it has none.

        Collective: all ranks must call it.
        """
        if self._num_pages:
            return
        run, device, decoder = self._run, self._device, self._grid.decoder
        _return_unused_memory(device)
        self._renew_weights()
        self._num_pages = count_pages(run, device)
        if decoder is not None:
            cache = RankCache(
                layers=allocate(run, self._num_pages, device),
                page_tokens=run.rollout.page_tokens,
                tensor_rank=decoder.tp.rank(),
                num_tensor_ranks=run.parallel.decoder.tensor,
                device=device,
            )
            stage = self._model.stages[0].module
            self._replica = Replica(
                run, stage, cache, decoder.tp, self._meter, notes_routes=self._notes_routes
            )

    def sleep(self) -> None:
        """Give cache and weights that are copies to whoever needs the memory, until answers are.

        No answer may be under way.
        """
        assert not self._is_answering, "whoever takes answers takes all of them before the sleep"
        if self._replica is not None:
            self._replica.close()
        self._schedulers, self._replica, self._num_pages = [], None, 0
        if self._refit is not None:
            self._refit.release()
        _return_unused_memory(self._device)

    def take_weights(self, version: int) -> None:
        """Answer with the weights as they are now; no key of earlier ones is read again.

        Collective: all ranks must call it. Answers that go on run again from their prompt, and
        draw their next tokens from the new weights.

        Args:
            version: Number of these weights.
        """
        self.version = version
        for scheduler in self._schedulers:
            scheduler.drop_caches()
        if self._replica is not None:
            self._replica.forget()
        if self._refit is not None:
            self._refit.note_update()
        if self._num_pages:
            self._renew_weights()

    def _renew_weights(self) -> None:
        if self._refit is not None:
            with self._heartbeat.doing("refit", exchange="the weights of all ranks"):
                self._refit.renew()

    def take_seconds(self) -> dict[str, float]:
        """Return seconds of this rank since the last call.

        "vision": waiting for patches and encoding them; "prefill": the decoder on prompts, where
        vision has ranks of its own with the wait for features; "decode": new tokens of answers.
        """
        taken = {name: self._seconds[name] for name in ("vision", "prefill", "decode")}
        self._seconds.clear()
        return taken

    def generate(
        self, requests: Iterable[Request], on_token: Callable[[NewToken], None] | None = None
    ) -> Iterator[Completion]:
        """Yield answers in the order in which they end. Collective: all ranks, to the last answer.

        Until then the model is in evaluation mode. An engine that sleeps wakes up.

        Args:
            requests: The same on every rank, with keys of their own; taken as there is room.
            on_token: Called on every rank with each token as it is drawn.

        Raises:
            UserError: For a prompt that the cache cannot hold, or media that cannot be read.
        """
        self.wake()
        model, rollout = self._run.model, self._run.rollout
        self._schedulers = [
            ReplicaScheduler(
                rollout, self._num_pages, model.vision.merge_size, model.vision_token_ids
            )
            for _ in range(self._run.parallel.decoder.data)
        ]
        waiting = iter(requests)
        self._is_answering = True
        try:
            with self._model.evaluation():
                while self._take_requests(waiting):
                    yield from self._tick(on_token)
        finally:
            self._is_answering = False

    def _tick(self, on_token: Callable[[NewToken], None] | None) -> list[Completion]:
        """Run what every replica has planned, and return the answers that end with it."""
        self._heartbeat.note("generate")
        ticks = [scheduler.plan() for scheduler in self._schedulers]
        with torch.no_grad():
            drawn = tell_drawn(ticks, self._run_tick(ticks), self._run, self._device)
            if self._notes_routes:
                own = self._replica.take_experts() if self._replica is not None else None
                tell_routes(ticks, own, self._run, self._device)
        completions = []
        for scheduler, tick, tokens in zip(self._schedulers, ticks, drawn, strict=True):
            completions += scheduler.note(tick, tokens, self.version)
            if on_token is not None:
                _announce(tick, tokens, on_token)
        return completions

    def _take_requests(self, waiting: Iterator[Request]) -> bool:
        """Give requests to replicas that have room for them; False when all is answered."""
        while hungry := [s for s in self._schedulers if s.wants_request]:
            request = next(waiting, None)
            if request is None:
                break
            min(hungry, key=lambda scheduler: scheduler.num_tokens).add(request)
        return not all(scheduler.is_idle for scheduler in self._schedulers)

    def _run_tick(self, ticks: list[ReplicaTick]) -> Tensor | None:
        """Run what this rank's replica has to; None on a dedicated vision rank.

        Where any replica runs pieces, or answers, all do, since their experts are needed.

        Returns:
            float64 [A, 2]: token and log-probability of each of this replica's `tick.drawn`.
        """
        replica = self._replica
        place = self._grid.place().data if replica is not None else 0
        tick = ticks[place]
        found = []
        if replica is not None:
            replica.copy_pages(tick)
        if any(each.pieces for each in ticks):
            rows = [packed_pieces(t.pieces, self._row_tokens(ticks)) for t in ticks]
            run_pieces = None
            if replica is not None:
                run_pieces = partial(replica.run_pieces, tick.pieces, rows[place])
            with self._part("prefill"):
                found += self._prefill(rows, run_pieces)
            self._seconds["vision"] += self._prefill.vision_seconds
            self._seconds["prefill"] -= self._prefill.vision_seconds
        if any(each.decoded for each in ticks) and replica is not None:
            with self._part("decode"):
                found.append(replica.run_answers(tick.decoded))
        assert found or replica is None, "every tick runs something"
        return torch.cat(found) if replica is not None else None

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Measure a part of a tick, and wait for its end.

        The host reads the draws next anyway; a tick of prompts and answers waits once more.
        """
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._seconds[name] += time.perf_counter() - began

    def _row_tokens(self, ticks: list[ReplicaTick]) -> int:
        """Return the length of the longest replica's row, as the tensor ranks can split it."""
        multiple = max(2, self._run.parallel.decoder.tensor)
        longest = max(sum(p.end - p.start for p in tick.pieces) for tick in ticks)
        return -(-longest // multiple) * multiple


def _return_unused_memory(device: torch.device) -> None:
    """Return what torch keeps of freed memory, so that it counts as free and may be cut anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _announce(tick: ReplicaTick, tokens: Drawn, on_token: Callable[[NewToken], None]) -> None:
    """Tell of each token that its answer took."""
    for answer, (token, log_prob) in zip(tick.drawn, tokens, strict=True):
        if answer.finish != "aborted":
            on_token(
                NewToken(
                    key=answer.group.request.key,
                    answer=answer.number,
                    token_id=token,
                    log_prob=log_prob,
                )
            )
