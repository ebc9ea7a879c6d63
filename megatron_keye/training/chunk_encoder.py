"""Runs vision chunk by chunk: once without activations, once more for the gradients.

Memory is bounded by one chunk, whatever the video's length.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.data.decode_service import DecodeStatistics
from megatron_keye.data.row import PackedRow, Picture
from megatron_keye.parallel.plan import StepPlan
from megatron_keye.parallel.recorder import Recorder


class PatchSource(Protocol):
    """Gives the patches of chunks in the order in which they were announced."""

    def start_step(self, chunks: Sequence[Sequence[Picture]]) -> None:
        """Announce the pictures of each chunk of a step."""

    def wait_until_decoded(self) -> dict[str, str]:
        """Wait for the next step as a whole; return which of its files failed, and why."""

    def take(self) -> Tensor:
        """Return the next chunk's input of `vision`, P patches long, on any device."""

    def statistics(self) -> DecodeStatistics:
        """Return what was counted since the last call."""


class ChunkEncoder:
    """Encodes the chunks of one step on this rank."""

    def __init__(
        self,
        run: RunConfig,
        vision: torch.nn.Module,
        source: PatchSource,
        device: torch.device,
        rank: int,
    ) -> None:
        """Take what stays the same over steps.

        Args:
            run: Sizes and precision.
            vision: ViT and projector in their data-parallel wrapper, or the projector alone.
            source: Turns pictures into the input of `vision`.
            device: Where the ViT runs.
            rank: This rank, whose chunks the plan names.
        """
        self._vision, self._source, self._device = vision, source, device
        self._rank = rank
        self._dtype = weight_dtype(run)
        self._inputs: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}
        self._plan = StepPlan(chunks=(), shipments=(), exchanges=())
        self._recorder = Recorder()
        self._rows: list[PackedRow] = []
        self._due: deque[int] = deque()
        self._announced: deque[list[list[Picture]]] = deque()
        self.num_pictures = 0
        """Pictures decoded in this step."""
        self.seconds = 0.0
        """Time spent on this step's chunks."""
        self.wait_seconds = 0.0
        """The part of it in which decoded chunks were waited for."""
        self._agreeing_seconds = 0.0

    def announce(self, plan: StepPlan, rows: list[PackedRow]) -> None:
        """Let the source work on a later step already.

        Args:
            plan: The next step's that was not announced yet.
            rows: Its rows.
        """
        chunks = [_pictures(plan, rows, chunk) for chunk in plan.chunks_of(self._rank)]
        self._announced.append(chunks)
        self._source.start_step(chunks)

    def wait_until_decoded(self) -> dict[str, str]:
        """Wait until the next step, announced before, is decoded as a whole.

        Returns:
            Its files that could not be decoded, and why; their pictures are grey.
        """
        started = time.perf_counter()
        failed = self._source.wait_until_decoded()
        self._agreeing_seconds = time.perf_counter() - started
        return failed

    def start_step(self, plan: StepPlan, rows: list[PackedRow], recorder: Recorder) -> None:
        """Take the plan and the rows of the next step announced, and what notes its phases."""
        self._plan, self._rows, self._recorder = plan, rows, recorder
        self._inputs.clear()
        self.num_pictures = 0
        self.seconds = self.wait_seconds = self._agreeing_seconds
        self._agreeing_seconds = 0.0
        self._due = deque(plan.chunks_of(self._rank))
        announced = self._announced.popleft()
        chunks = [_pictures(plan, rows, chunk) for chunk in self._due]
        assert announced == chunks, "steps run in the order in which they were announced"

    @torch.no_grad()
    def encode(self, chunk: int) -> Tensor:
        """Encode a decoded chunk, keeping its patches on the CPU for the backward pass.

        Args:
            chunk: Index in the plan; this rank's chunks come in the plan's order.

        Returns:
            Features [M, D].
        """
        started = time.perf_counter()
        due = self._due.popleft()
        assert due == chunk, "chunks are encoded in the order of decoding"
        label, decoding = f"chunk {chunk}", self._recorder.begin()
        pictures = _pictures(self._plan, self._rows, chunk)
        grids = [picture.grid for picture in pictures]
        patches = self._source.take()
        self._recorder.end("decode", label, decoding)
        self.wait_seconds += time.perf_counter() - started
        patches = patches.to(self._dtype)
        self._inputs[chunk] = patches.cpu(), grids
        self.num_pictures += len(pictures)
        with self._recorder.phase("encode", label):
            features_MD = self._forward(patches, grids)
        self.seconds += time.perf_counter() - started
        return features_MD

    def backward(self, chunk: int, gradient_MD: Tensor) -> None:
        """Encode a chunk again and add up the gradients of the weights.

        Args:
            chunk: Index in the plan.
            gradient_MD: [M, D], gradient of the chunk's features.
        """
        started = time.perf_counter()
        with self._recorder.phase("vision", f"chunk {chunk}"):
            features_MD = self._forward(*self._inputs.pop(chunk))
            torch.autograd.backward(features_MD, gradient_MD.to(features_MD.dtype))
        self.seconds += time.perf_counter() - started

    def statistics(self) -> DecodeStatistics:
        """Return what was decoded since the last call."""
        return self._source.statistics()

    def _forward(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        features: Tensor = self._vision(patches.to(self._device), grids)
        return features


def _pictures(plan: StepPlan, rows: list[PackedRow], chunk: int) -> list[Picture]:
    """Look up the pictures of a chunk."""
    return [rows[slot.row].pictures[slot.index] for slot in plan.chunks[chunk].pictures]
