"""Runs vision chunk by chunk: once without activations, once more for the gradients.

Memory is bounded by one chunk, whatever the video's length.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow, Picture
from megatron_keye.parallel.plan import StepPlan
from megatron_keye.parallel.recorder import Recorder

LoadPatches = Callable[[Sequence[Picture]], Tensor]
"""From pictures to their patches, float32 [P, channels, patch, patch], on the CPU."""


class ChunkEncoder:
    """Encodes the chunks of one step on this rank."""

    def __init__(
        self,
        run: RunConfig,
        vision: torch.nn.Module,
        load_patches: LoadPatches,
        device: torch.device,
    ) -> None:
        """Take what stays the same over steps.

        Args:
            run: Sizes and precision.
            vision: ViT and projector, in their data-parallel wrapper.
            load_patches: Decodes pictures into patches.
            device: Where the ViT runs.
        """
        self._vision, self._load_patches, self._device = vision, load_patches, device
        self._dtype = weight_dtype(run)
        self._inputs: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}
        self._plan = StepPlan(chunks=(), shipments=(), exchanges=())
        self._recorder = Recorder()
        self._rows: list[PackedRow] = []
        self.num_pictures = 0
        """Pictures decoded in this step."""
        self.seconds = 0.0
        """Time spent on this step's chunks."""

    def start_step(self, plan: StepPlan, rows: list[PackedRow], recorder: Recorder) -> None:
        """Take the plan and the rows of the next step, and what notes its phases."""
        self._plan, self._rows, self._recorder = plan, rows, recorder
        self._inputs.clear()
        self.num_pictures, self.seconds = 0, 0.0

    @torch.no_grad()
    def encode(self, chunk: int) -> Tensor:
        """Decode and encode a chunk, keeping its patches on the CPU for the backward pass.

        Args:
            chunk: Index in the plan.

        Returns:
            Features [M, D].
        """
        started = time.perf_counter()
        label, decoding = f"chunk {chunk}", self._recorder.begin()
        pictures = [
            self._rows[slot.row].pictures[slot.index] for slot in self._plan.chunks[chunk].pictures
        ]
        patches = self._load_patches(pictures).to(self._dtype)
        self._inputs[chunk] = patches, [picture.grid for picture in pictures]
        self.num_pictures += len(pictures)
        self._recorder.end("decode", label, decoding)
        with self._recorder.phase("encode", label):
            features_MD = self._forward(*self._inputs[chunk])
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

    def _forward(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        features: Tensor = self._vision(patches.to(self._device), grids)
        return features
