# SPDX-License-Identifier: Apache-2.0
"""Settings of the optimizer: AdamW, its learning rate over the steps and by part of the model."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_keye.config.check import check, check_numbers
from megatron_keye.config.parts import PARTS, Part

Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay"]
Moments = Literal["fp32", "bf16"]
Overlap = Literal["auto", "on", "off"]

SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant", "warmup_stable_decay")
MOMENTS: tuple[Moments, ...] = ("fp32", "bf16")
OVERLAP: tuple[Overlap, ...] = ("auto", "on", "off")

_LARGEST_BETA = 1 - 2**-8
"""A moment in bf16 decays by no smaller part of itself: it would be rounded back for ever."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning rate over the steps, and the rates of parts of the model."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: "cosine" and "linear" decay until the last step, "constant"
    stays at the peak, "warmup_stable_decay" stays there until decay_steps before the end and then
    decays linearly."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from 0."""
    decay_steps: int = 0
    """With warmup_stable_decay, the steps of the decay at the end; 0 with other schedules."""
    vision_rate_multiplier: float = 1.0
    """Factor of the ViT's learning rate."""
    projector_rate_multiplier: float = 1.0
    """Factor of the projector's learning rate."""
    decoder_rate_multiplier: float = 1.0
    """Factor of the decoder's learning rate, indexers excluded."""
    indexer_rate_multiplier: float = 1.0
    """Factor of the indexers' learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of weights with two dimensions or more: matrices, the patch
    embedding, and also the router, token embeddings and position tables. Norms and biases, all
    that have one dimension, have none."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    clip_gradient_norm: float = 1.0
    """Gradients are clipped to this norm over decoder and vision together; 0: no clipping."""
    distributed: bool = True
    """Whether data-parallel ranks share the optimizer (Megatron's distributed optimizer, ZeRO-1):
    each keeps moments and master weights of one shard and updates it, then weights are gathered.
    Otherwise each keeps all. Checkpoints are the same for both; ignored with fp64."""
    moments: Moments = "fp32"
    """Type that both moments are kept in. The update computes in fp32 with either; "bf16" saves 4
    bytes a weight, and rounds what the next update reads."""
    offload: float = 0.0
    """Share of the weights whose moments and master weights are kept in the machine's main memory,
    0 to 1. They pass through the GPU at each update, which computes the same: 12 bytes a weight
    there and back, with bf16 moments 8. All replicas of one machine need that memory at once, and
    as much again for checkpoints with training.checkpoint.asynchronous."""
    overlap: Overlap = "off"
    """Whether the decoder's gradients are summed over data-parallel and context-parallel ranks
    while the last backward pass of a step still runs, in buckets of 40 million. "auto": on
    GPUs. Off by default until it is measured there."""

    def __post_init__(self) -> None:
        peak, low = self.learning_rate, self.min_learning_rate
        for part in PARTS:
            self._check(
                0 < self.rate_multiplier(part) < math.inf,
                f"{part}_rate_multiplier",
                f"a finite number above 0; to leave it as it is, add {part} to training.frozen",
            )
        multipliers = " ".join(f"{part}_rate_multiplier" for part in PARTS)
        check_numbers(
            self,
            "training.optimizer",
            above_zero=f"learning_rate epsilon {multipliers}",
            zero_or_more="min_learning_rate warmup_steps decay_steps weight_decay beta1 beta2 "
            "clip_gradient_norm offload",
        )
        self._check(low <= peak, "min_learning_rate", f"0 to learning_rate = {peak}")
        self._check(self.schedule in SCHEDULES, "schedule", f"one of {SCHEDULES}")
        self._check(self.overlap in OVERLAP, "overlap", f"one of {OVERLAP}")
        self._check(
            low == 0 or self.schedule != "constant",
            "min_learning_rate",
            '0 with schedule = "constant", which never decays to it',
        )
        if self.schedule == "warmup_stable_decay":
            self._check(self.decay_steps > 0, "decay_steps", "1 or more with warmup_stable_decay")
        else:
            rule = f'0 with schedule = "{self.schedule}", which has no decay of its own length'
            self._check(self.decay_steps == 0, "decay_steps", rule)
        for name in ("beta1", "beta2"):
            self._check(getattr(self, name) < 1, name, "0 or more, and below 1")
        self._check_state()

    def _check_state(self) -> None:
        """Check how and where the state is kept."""
        self._check(self.moments in MOMENTS, "moments", f"one of {MOMENTS}")
        self._check(self.offload <= 1, "offload", "a share from 0 to 1")
        self._check(
            self.distributed or not self.is_staged,
            "distributed",
            "true with moments in bf16 or a share in main memory (offload)",
        )
        if self.moments == "bf16":
            for name in ("beta1", "beta2"):
                self._check(
                    getattr(self, name) <= _LARGEST_BETA,
                    name,
                    f"at most {_LARGEST_BETA} with moments in bf16, which would else be rounded "
                    "back to what they were",
                )

    @property
    def is_staged(self) -> bool:
        """Whether state passes through the GPU in parts: in another type, or from main memory."""
        return self.moments != "fp32" or self.offload > 0

    def _check(self, holds: bool, name: str, expected: str) -> None:
        check(holds, f"training.optimizer.{name}", getattr(self, name), expected)

    def rate_multiplier(self, part: Part) -> float:
        """Return the factor of a part's learning rate."""
        return float(getattr(self, f"{part}_rate_multiplier"))
