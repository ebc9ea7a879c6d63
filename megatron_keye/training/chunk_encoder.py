"""Runs vision chunk by chunk: once without activations, once more for the gradients.

Memory is bounded by one chunk, whatever the video's length.
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
from megatron_keye.plan.slots import returns_gradients
from megatron_keye.plan.step import StepPlan


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


@dataclass(frozen=True, kw_only=True)
class _Due:
    """One chunk of this rank."""

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
        self._dtype, self._width = weight_dtype(run), run.model.decoder.hidden_size
        self._learns = returns_gradients(run)
        self._inputs: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}
        self._recorder = Recorder()
        self._due: deque[tuple[int, _Due]] = deque()
        self._announced: deque[list[_Due]] = deque()
        self._ahead: deque[Tensor] = deque()
        vision_parallel = run.parallel.vision
        works_ahead = vision_parallel.placement == "dedicated" and not self._learns
        self._ahead_bytes = vision_parallel.max_ahead_mebibytes * 2**20 if works_ahead else 0
        self.num_pictures = 0
        """Pictures of this step that are encoded."""
        self.seconds = 0.0
        """Time spent on chunks in this step, those of the next one included."""
        self.wait_seconds = 0.0
        """The part of it in which decoded chunks were waited for."""
        self._agreeing_seconds = 0.0

    def announce(self, plan: StepPlan, rows: list[PackedRow]) -> None:
        """Let the source work on a later step already.

        Args:
            plan: The next step's that was not announced yet.
            rows: Its rows.
        """
        due = [_due(plan, rows, chunk) for chunk in plan.chunks_of(self._rank)]
        self._announced.append(due)
        self._source.start_step([chunk.pictures for chunk in due])

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
        self._recorder = recorder
        self._inputs.clear()
        self.num_pictures = 0
        self.seconds = self.wait_seconds = self._agreeing_seconds
        self._agreeing_seconds = 0.0
        chunks = plan.chunks_of(self._rank)
        self._due = deque(zip(chunks, self._announced.popleft(), strict=True))
        is_announced = all(due == _due(plan, rows, chunk) for chunk, due in self._due)
        assert is_announced, "steps run in the order in which they were announced"

    @torch.no_grad()
    def encode(self, chunk: int) -> Tensor:
        """Encode a decoded chunk, keeping its patches on the CPU if a backward pass will come.

        Args:
            chunk: Index in the plan; this rank's chunks come in the plan's order.

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
        """Encode one more chunk of the next step, for a decoder that is still at this one.

        Features are kept until their step comes: weights that do not learn give them now as then.
        A file that cannot be decoded is left for its step to report.

        Returns:
            Whether it did: no step may be announced, or the limit be reached.
        """
        if not self._announced or len(self._ahead) == len(self._announced[0]):
            return False
        assert not self._due, "this step comes first"
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
        """Encode a chunk again and add up the gradients of the weights.

        Args:
            chunk: Index in the plan.
            gradient_MD: [M, D], gradient of the chunk's features.
        """
        started = time.perf_counter()
        with self._recorder.span("vision", f"chunk {chunk}"):
            features_MD = self._forward(*self._inputs.pop(chunk))
            torch.autograd.backward(features_MD, gradient_MD.to(features_MD.dtype))
        self.seconds += time.perf_counter() - started

    def statistics(self) -> DecodeStatistics:
        """Return what was decoded since the last call."""
        return self._source.statistics()

    def _encode(self, due: _Due, label: str, keep_as: int | None = None) -> Tensor:
        """Encode the chunk that is decoded next, and keep its input under a number if need be."""
        started, decoding = time.perf_counter(), self._recorder.begin()
        patch_grids = [picture.patch_grid for picture in due.pictures]
        patches = self._source.take()
        self._recorder.end("decode", label, decoding)
        self.wait_seconds += time.perf_counter() - started
        patches = patches.to(self._dtype)
        if keep_as is not None:
            self._inputs[keep_as] = patches.cpu(), patch_grids
        with self._recorder.span("encode", label):
            features_MD = self._forward(patches, patch_grids)
        if keep_as is None and self._device.type == "cuda":
            # No copy holds the host, which has to see after each chunk how far the decoder is.
            torch.cuda.current_stream().synchronize()
        self.seconds += time.perf_counter() - started
        return features_MD

    def _forward(self, patches: Tensor, patch_grids: list[tuple[int, int]]) -> Tensor:
        features: Tensor = self._vision(patches.to(self._device), patch_grids)
        return features


def _due(plan: StepPlan, rows: list[PackedRow], chunk: int) -> _Due:
    """Look up the pictures of a chunk."""
    planned = plan.chunks[chunk]
    pictures = [rows[slot.row].pictures[slot.index] for slot in planned.pictures]
    return _Due(pictures=pictures, num_tokens=planned.num_tokens)
