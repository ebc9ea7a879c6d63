# SPDX-License-Identifier: Apache-2.0
"""Runs vision chunk by chunk, forward and later backward.

Activations wait for the backward pass as far as there is room; other chunks are encoded again, so
that memory is bounded whatever the video's length.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow, Picture
from megatron_keye.data.video.decode_service import DecodeStatistics
from megatron_keye.errors import UserError
from megatron_keye.observe.recorder import Recorder
from megatron_keye.plan.step import StepPlan


class PatchSource(Protocol):
    """Supplies the patches of chunks in the order in which they were announced."""

    def start_step(self, chunks: Sequence[Sequence[Picture]]) -> None:
        """Announce the pictures of each chunk of a step."""

    def wait_until_decoded(self) -> dict[str, str]:
        """Wait until the whole next step is decoded; return the files that failed, and why."""

    def take(self) -> Tensor:
        """Return the next chunk's input of `vision`, P patches long, on any device."""

    def statistics(self) -> DecodeStatistics:
        """Return statistics of decoding since the last call."""

    def close(self) -> None:
        """Let go of threads and devices; chunks that were not taken are dropped."""


@dataclass(frozen=True, kw_only=True)
class _PictureChunk:
    """One chunk of this rank that is still to be encoded."""

    pictures: list[Picture]
    """Its pictures."""
    num_tokens: int
    """Merged tokens M that they become."""


class ChunkEncoder:
    """Encodes the chunks of one step on this rank, and of the next one where it may."""

    def __init__(
        self,
        run: RunConfig,
        vision: torch.nn.Module,
        source: PatchSource,
        device: torch.device,
        rank: int,
        *,
        learns: bool,
        kept_patches: int = 0,
    ) -> None:
        """Create an encoder for all steps.

        Args:
            run: Sizes and precision.
            vision: ViT and projector in their data-parallel wrapper, or the projector alone.
            source: Supplies the input of `vision`.
            device: Where `vision` runs.
            rank: This rank.
            learns: Whether chunks have a backward pass.
            kept_patches: Most patches whose activations wait for it at once.
        """
        self._vision, self._source, self._device = vision, source, device
        self._rank = rank
        self._dtype, self._width = weight_dtype(run), run.model.decoder.hidden_size
        self._learns = learns
        self._room_patches = kept_patches
        self._outputs: dict[int, tuple[Tensor, int]] = {}
        self._inputs: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}
        self._recorder = Recorder()
        self._due: deque[tuple[int, _PictureChunk]] = deque()
        self._announced: deque[list[_PictureChunk]] = deque()
        self._ahead: deque[Tensor] = deque()
        vision_parallel = run.parallel.vision
        works_ahead = rank >= run.parallel.decoder.num_ranks and not self._learns
        self._ahead_bytes = vision_parallel.max_ahead_mebibytes * 2**20 if works_ahead else 0
        self.num_pictures = 0
        """Pictures of this step that are encoded so far."""
        self.seconds = 0.0
        """Time spent on chunks during this step, those of the next step included."""
        self.wait_seconds = 0.0
        """The part of it spent waiting for decoded chunks."""
        self._whole_step_seconds = 0.0

    def announce(self, plan: StepPlan, rows: list[PackedRow]) -> None:
        """Let the source decode one more step, behind those that were announced before.

        May run in another thread.

        Args:
            plan: Plan of the step.
            rows: Its rows, in the plan's order.
        """
        chunks = [_picture_chunk(plan, rows, chunk) for chunk in plan.chunks_of(self._rank)]
        self._source.start_step([chunk.pictures for chunk in chunks])
        # Last, since `encode_ahead` may look at it from another thread.
        self._announced.append(chunks)

    def wait_until_decoded(self) -> dict[str, str]:
        """Wait until the whole next step, announced before, is decoded.

        Returns:
            Reason by path, for files that could not be decoded; their pictures are grey.
        """
        started = time.perf_counter()
        failed = self._source.wait_until_decoded()
        self._whole_step_seconds = time.perf_counter() - started
        return failed

    def start_step(self, plan: StepPlan, rows: list[PackedRow], recorder: Recorder) -> None:
        """Begin the next announced step, given its plan and rows again, and its recorder."""
        self._recorder = recorder
        self._inputs.clear()
        for chunk in list(self._outputs):
            self._take_output(chunk)
        self.num_pictures = 0
        self.seconds = self.wait_seconds = self._whole_step_seconds
        self._whole_step_seconds = 0.0
        chunks = plan.chunks_of(self._rank)
        self._due = deque(zip(chunks, self._announced.popleft(), strict=True))
        is_announced = all(due == _picture_chunk(plan, rows, chunk) for chunk, due in self._due)
        assert is_announced, "steps run in the order in which they were announced"

    @torch.no_grad()
    def encode(self, chunk: int) -> Tensor:
        """Encode the next chunk, and keep for a backward pass its activations or its patches.

        Args:
            chunk: Index in the plan; a rank encodes its chunks in the plan's order.

        Returns:
            Features [M, D].
        """
        number, due = self._due.popleft()
        assert number == chunk, "chunks are encoded in the order of decoding"
        self.num_pictures += len(due.pictures)
        if self._ahead:
            return self._ahead.popleft()
        return self._encode(due, f"chunk {chunk}", keep_as=chunk if self._learns else None)

    @torch.no_grad()
    def encode_ahead(self) -> bool:
        """Encode one more chunk of the next step while the decoder still runs this one.

        Its features are kept for that step; frozen weights make them valid then too. An error of
        a file is left for that step to raise.

        Returns:
            Whether it did; not if nothing is left to encode or the memory limit is reached.
        """
        if not self._announced or len(self._ahead) == len(self._announced[0]):
            return False
        assert not self._due, "all chunks of this step are encoded first"
        due = self._announced[0][len(self._ahead)]
        held = sum(len(features_MD) for features_MD in self._ahead) + due.num_tokens
        if held * self._width * self._dtype.itemsize > self._ahead_bytes:
            return False
        try:
            self._ahead.append(self._encode(due, f"next step's chunk {len(self._ahead)}"))
        except UserError:
            return False
        return True

    def backward(self, chunk: int, gradient_MD: Tensor) -> None:
        """Accumulate the gradients of the weights; encodes a chunk without activations again.

        Args:
            chunk: Index in the plan.
            gradient_MD: Gradient [M, D] of the chunk's features.
        """
        started = time.perf_counter()
        with self._recorder.span("vision", f"chunk {chunk}"):
            if chunk in self._outputs:
                features_MD = self._take_output(chunk)
            else:
                features_MD = self._forward(*self._inputs.pop(chunk))
            torch.autograd.backward(features_MD, gradient_MD.to(features_MD.dtype))
        self.seconds += time.perf_counter() - started

    def statistics(self) -> DecodeStatistics:
        """Return statistics of decoding since the last call."""
        return self._source.statistics()

    def _encode(self, due: _PictureChunk, label: str, keep_as: int | None = None) -> Tensor:
        """Encode the next decoded chunk; `keep_as` is its number where a backward pass follows."""
        started = time.perf_counter()
        patch_grids = [picture.patch_grid for picture in due.pictures]
        with self._recorder.span("decode", label):
            patches = self._source.take()
        self.wait_seconds += time.perf_counter() - started
        patches = patches.to(self._dtype)
        num_patches = sum(picture.num_patches for picture in due.pictures)
        keeps_activations = keep_as is not None and num_patches <= self._room_patches
        if keep_as is not None and not keeps_activations:
            self._inputs[keep_as] = patches.cpu(), patch_grids
        with self._recorder.span("encode", label), torch.set_grad_enabled(keeps_activations):
            features_MD = self._forward(patches, patch_grids)
        if keep_as is not None and keeps_activations:
            self._room_patches -= num_patches
            self._outputs[keep_as] = features_MD, num_patches
            features_MD = features_MD.detach()
        if keep_as not in self._inputs and self._device.type == "cuda":
            # No copy synchronises here, but the host checks the decoder after each chunk.
            torch.cuda.current_stream().synchronize()
        self.seconds += time.perf_counter() - started
        return features_MD

    def _take_output(self, chunk: int) -> Tensor:
        """Return what a chunk became, with its activations, for which there is room again then."""
        features_MD, num_patches = self._outputs.pop(chunk)
        self._room_patches += num_patches
        return features_MD

    def _forward(self, patches: Tensor, patch_grids: list[tuple[int, int]]) -> Tensor:
        features: Tensor = self._vision(patches.to(self._device), patch_grids)
        return features


def _picture_chunk(plan: StepPlan, rows: list[PackedRow], chunk: int) -> _PictureChunk:
    """Look up the pictures of a chunk."""
    planned = plan.chunks[chunk]
    pictures = [rows[slot.row].pictures[slot.index] for slot in planned.pictures]
    return _PictureChunk(pictures=pictures, num_tokens=planned.num_tokens)
