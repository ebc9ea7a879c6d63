# SPDX-License-Identifier: Apache-2.0
"""Copies of a rank's tensors in main memory, from which a checkpoint is written.

The memory is taken once and used again by every save: to get it fresh costs several times what
the copy does. On GPUs it is pinned, so that copies run at the bus's full speed.
"""

import torch
from torch import Tensor

from megatron_keye.optim.pinned_memory import host_memory


class HostCopies:
    """The copies of one list of tensors, of the same shapes and types at every save."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._copies: list[Tensor] | None = None

    @torch.no_grad()
    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return copies that stay as they are until the next call.

        Args:
            tensors: On any device; always the same number, shapes and types.
        """
        is_pinned = any(tensor.is_cuda for tensor in tensors)
        if self._copies is None:
            self._copies = host_memory(tensors, is_pinned=is_pinned)
        assert len(self._copies) == len(tensors), "all saves have the same structure"
        if tensors:
            torch._foreach_copy_(self._copies, tensors, non_blocking=True)
        if is_pinned:
            torch.cuda.synchronize()
        return self._copies

    def close(self) -> None:
        """Give the memory back."""
        self._copies = None
