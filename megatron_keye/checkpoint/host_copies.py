"""Copies of a rank's tensors in main memory, from which a checkpoint is written.

The memory is taken once and used again by every save: to get it fresh costs several times what
the copy does. On GPUs it is pinned, so that copies run at the bus's full speed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 64


class HostCopies:
    """The copies of one list of tensors, of the same shapes and types at every save."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._copies: list[Tensor] = []
        self._memory: Tensor | None = None
        self._is_pinned = False

    @torch.no_grad()
    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return copies that stay as they are until the next call.

        Args:
            tensors: On any device; always the same number, shapes and types.
        """
        if self._memory is None:
            self._take_memory(tensors)
        assert len(self._copies) == len(tensors), "all saves have the same structure"
        if tensors:
            torch._foreach_copy_(self._copies, tensors, non_blocking=True)
        if self._is_pinned:
            torch.cuda.synchronize()
        return self._copies

    def close(self) -> None:
        """Give the memory back."""
        if self._memory is not None and self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._copies, self._memory = [], None

    def _take_memory(self, tensors: Sequence[Tensor]) -> None:
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        self._is_pinned = any(tensor.is_cuda for tensor in tensors)
        if self._is_pinned:
            # torch's own pinned memory comes in powers of two, up to twice of what is needed.
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        self._memory, start = memory, 0
        view = memoryview(memory.numpy())
        for tensor, size in zip(tensors, sizes, strict=True):
            self._copies.append(_tensor_in(view[start : start + tensor.nbytes], tensor))
            start += size


def _tensor_in(memory: memoryview, like: Tensor) -> Tensor:
    """Return a tensor whose storage is this memory alone, as torch.save writes whole storages."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)
