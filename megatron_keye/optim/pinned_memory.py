# SPDX-License-Identifier: Apache-2.0
"""Main memory that a GPU copies from and to at the full speed of its bus."""

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_ALIGNMENT = 64


def host_memory(like: Sequence[Tensor], *, is_pinned: bool) -> list[Tensor]:
    """Return tensors of 0 in main memory, all in one piece of it.

    torch's own pinned memory comes in powers of two, up to twice of what is needed. The piece is
    given back when none of the tensors is left. Each has a storage of its own, since torch.save
    writes whole storages.

    Args:
        like: Their shapes and types.
        is_pinned: Whether a GPU copies from and to them.

    Raises:
        RuntimeError: When the system does not let so much memory be pinned.
    """
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in like]
    total = int(sum(sizes))
    pages = mmap.mmap(-1, max(1, total), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Huge pages, where there are any, are taken and pinned several times faster.
    with suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    if is_pinned and total:
        _pin(pages)
    tensors, start = [], 0
    for tensor, size in zip(like, sizes, strict=True):
        tensors.append(_tensor_in(pages, start, tensor))
        start += size
    return tensors


def _pin(pages: mmap.mmap) -> None:
    runtime, address = torch.cuda.cudart(), torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, len(pages), 0))
    # Every tensor holds the pages. At the end of the process the driver does it.
    weakref.finalize(pages, runtime.cudaHostUnregister, address).atexit = False


def _tensor_in(pages: mmap.mmap, start: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    flat = torch.frombuffer(pages, dtype=like.dtype, count=like.numel(), offset=start)
    return flat.view(like.shape)
