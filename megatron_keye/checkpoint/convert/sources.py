# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a released checkpoint come from: files or random initialization."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_keye.checkpoint.hf.safetensors_index import Entry


class TensorSource(Protocol):
    """Gives each tensor of a released checkpoint; can be pickled."""

    def read(self, name: str, index: int | None) -> Tensor:
        """Return a tensor, or one slice along its first dimension; not to be written to."""


@dataclass(frozen=True)
class FreshTensor:
    """A tensor that no checkpoint has, initialized from its name and a seed alone."""

    shape: tuple[int, ...]
    """Its shape."""
    std: float
    """Standard deviation of a matrix; norms are 1 and biases 0."""
    seed: int
    """Seed of the run."""

    def initialize(self, name: str) -> Tensor:
        """Return the tensor in float32."""
        if len(self.shape) < 2:
            return torch.full(self.shape, 0.0 if name.endswith(".bias") else 1.0)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        return torch.empty(self.shape).normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class MixedSource:
    """Gives each tensor from its own origin."""

    origins: Mapping[str, Entry | FreshTensor]
    """Origin by name in the released checkpoint."""

    def read(self, name: str, index: int | None) -> Tensor:
        """Return a tensor, or one slice along its first dimension."""
        origin = self.origins[name]
        if isinstance(origin, Entry):
            return origin.read(index)
        tensor = origin.initialize(name)
        return tensor if index is None else tensor[index]
