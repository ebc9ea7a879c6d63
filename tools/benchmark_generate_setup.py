# SPDX-License-Identifier: Apache-2.0
"""What the cases of tools/benchmark_generate.py share: model, prompts, training's forward, clocks.

Shape letters: L labels, B micro-batch, which is 1, V vocabulary.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_keye.config import RunConfig
from megatron_keye.config.megatron import weight_dtype
from megatron_keye.data.packing import pack
from megatron_keye.data.row import IGNORED_LABEL, Picture, Sample, labels_of
from megatron_keye.data.video.decode_service import DecodeStatistics
from megatron_keye.decoder.cross_entropy import token_losses
from megatron_keye.decoder.row import RowMeter
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.rollout.request import Request
from megatron_keye.training.microbatch import cut_row

WARM_UPS = 2


class NoPictures:
    """The source of patches where prompts have no pictures."""

    def start_step(self, chunks: Sequence[Sequence[Picture]]) -> None:
        """Take a step without chunks."""
        assert not chunks, "prompts are text"

    def wait_until_decoded(self) -> dict[str, str]:
        """Return that no file failed."""
        return {}

    def take(self) -> Tensor:
        """Be never called."""
        raise AssertionError("there is no chunk")

    def statistics(self) -> DecodeStatistics:
        """Return statistics of nothing."""
        return DecodeStatistics()

    def close(self) -> None:
        """Hold nothing."""


@dataclass
class Clock:
    """Sums the time that a device works between marks, without stopping it."""

    device: torch.device
    """Where the work is."""
    _marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _seconds: float = 0.0
    _began: float = 0.0

    def start(self) -> None:
        """Mark a beginning."""
        self._began = time.perf_counter()
        if self.device.type == "cuda":
            self._marks.append((_event(), torch.cuda.Event(enable_timing=True)))

    def stop(self) -> None:
        """Mark the end of what began last."""
        self._seconds += time.perf_counter() - self._began
        if self.device.type == "cuda":
            self._marks[-1][1].record()

    def milliseconds(self) -> float:
        """Wait for the device; return the sum so far and forget it."""
        total = 1e3 * self._seconds
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            total = sum(start.elapsed_time(end) for start, end in self._marks)
        self._marks, self._seconds = [], 0.0
        return total

    @contextmanager
    def around(self, first: torch.nn.Module, last: torch.nn.Module) -> Iterator[None]:
        """Measure from one module's beginning to another's end, until the context ends."""
        hooks = [
            first.register_forward_pre_hook(lambda module, inputs: self.start()),
            last.register_forward_hook(lambda module, inputs, outputs: self.stop()),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class Bench:
    """A model on the only rank, and what is asked of it."""

    run: RunConfig
    """As it generates."""
    grid: Grid
    """Of one rank."""
    model: KeyeModel
    """With random weights."""
    device: torch.device
    """Where it is."""
    options: argparse.Namespace
    """Of the command line."""

    @property
    def stage(self) -> VirtualStage:
        """The whole decoder."""
        stage: VirtualStage = self.model.stages[0].module
        return stage

    def engine(self, run: RunConfig | None = None) -> EmbeddedEngine:
        """Return an engine with a cache of its own."""
        return EmbeddedEngine(
            run or self.run, self.grid, self.model, source=NoPictures(), device=self.device
        )

    def prompt(self) -> Sample:
        """Return a prompt of random words."""
        tokens = np.random.default_rng(1).integers(1000, size=self.options.tokens)
        return _sample(tokens, np.zeros(len(tokens), dtype=np.float32))

    def request(self, *, num_answers: int = 1, max_new_tokens: int = 1) -> Request:
        """Return a request for answers that end by their length."""
        return Request(
            key=0,
            prompt=self.prompt(),
            num_answers=num_answers,
            max_new_tokens=max_new_tokens,
            stop_ids=(),
            seed=1,
        )

    @torch.no_grad()
    def training_forward(self, answer: Sequence[int] = (0,)) -> Tensor:
        """Run training's forward pass of the prompt and an answer, without the indexer's loss.

        Returns:
            Log-probability of each token of the answer, [L].
        """
        prompt = self.prompt().token_ids
        tokens = np.concatenate([prompt, np.array(answer, dtype=np.int64)])
        weights = np.zeros(len(tokens), dtype=np.float32)
        weights[len(prompt) - 1 : -1] = 1
        row = pack([_sample(tokens, weights)], len(tokens), pad_token_id=0)
        run = replace(self.run, data=replace(self.run.data, row_tokens=len(tokens)))
        batch = cut_row(row, run, self.grid.place()).to(self.device)
        states: list[Tensor] = []
        hook = self.stage.output_layer.register_forward_pre_hook(
            lambda module, inputs: states.append(inputs[0])
        )
        width = run.model.decoder.hidden_size
        try:
            self.stage(
                batch,
                torch.zeros(0, width, dtype=weight_dtype(run), device=self.device),
                indexer_loss_weight=0.0,
                meter=RowMeter(),
                where="benchmark",
                phase="sparse",
            )
        finally:
            hook.remove()
        # The stage's own logits were overwritten by its loss.
        logits_LBV = self.stage.logits(states[0])
        return -token_losses(logits_LBV, batch.labels_L[:, None], self.stage.tp_group).squeeze(1)


def repeated(call: Callable[[], object], repeats: int) -> Iterator[None]:
    """Call something a few times unseen, then yield after each of the calls that count."""
    for _ in range(WARM_UPS):
        call()
    for _ in range(repeats):
        call()
        yield


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _sample(token_ids: NDArray[np.int64], weights: NDArray[np.float32]) -> Sample:
    return Sample(
        name="random",
        token_ids=token_ids,
        labels=labels_of(token_ids, weights)
        if weights.any()
        else np.full(len(token_ids), IGNORED_LABEL),
        weights=weights,
        pictures=(),
        picture_starts=(),
    )
