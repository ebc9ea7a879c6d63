# SPDX-License-Identifier: Apache-2.0
"""Reads tensors, or parts of them, from a checkpoint that training saved on any grid.

The format is torch.distributed.checkpoint's: shards of tensors in *.distcp files, listed in
.metadata. Reading it directly needs no process group and no model, and runs no code from the files
(`checkpoint.safe_metadata`), but relies on torch's private `_StorageInfo` and `_create_file_view`.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_keye.checkpoint.manifest import check_sizes
from megatron_keye.checkpoint.safe_metadata import load_plain, read_metadata, undamaged
from megatron_keye.checkpoint.storage_format import METADATA
from megatron_keye.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredShard:
    """A stored part of a tensor, torch's chunk."""

    offset: Shape
    """Where it begins in the whole tensor."""
    shape: Shape
    """Its shape."""
    file: str
    """Name of its file."""
    start: int
    """First byte in the file."""
    size_bytes: int
    """Bytes in the file."""


@dataclass(frozen=True)
class NativeTensor:
    """A whole tensor, layers and experts stacked."""

    shape: Shape
    """Its shape."""
    dtype: torch.dtype
    """Its type."""
    shards: dict[int, list[StoredShard]]
    """Shards by their offset along dim 0."""

    def shards_of(self, offset: Shape, shape: Shape) -> Iterator[StoredShard]:
        """Yield the shards that overlap with the part of this offset and shape."""
        for start, group in self.shards.items():
            if offset and not offset[0] - self._most_rows < start < offset[0] + shape[0]:
                continue
            for shard in group:
                ranges = zip(offset, shape, shard.offset, shard.shape, strict=True)
                if all(a < b + m and b < a + n for a, n, b, m in ranges):
                    yield shard

    @cached_property
    def _most_rows(self) -> int:
        """Longest shard along dim 0."""
        shards = (shard for group in self.shards.values() for shard in group)
        return max((shard.shape[0] for shard in shards if shard.shape), default=0)


class NativeFolder:
    """All tensors of a checkpoint."""

    def __init__(self, folder: Path, *, has_optimizer: bool = False) -> None:
        """Read the metadata and check that every file is there with its size.

        Args:
            folder: The checkpoint.
            has_optimizer: Whether the optimizer's tensors are wanted beside the weights.

        Raises:
            UserError: When the folder is no whole checkpoint.
        """
        check_sizes(folder)
        self.path = folder
        metadata = read_metadata(folder)
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
        with undamaged(folder / METADATA):
            self.tensors = {
                key: _tensor(key, stored, storage)
                for key, stored in entries.items()
                if isinstance(stored, TensorStorageMetadata)
                and (has_optimizer or not key.startswith("optimizer."))
            }
            self._objects = {
                key: _object(storage[MetadataIndex(key)])
                for key, stored in entries.items()
                if isinstance(stored, BytesStorageMetadata)
            }

    def read(self, key: str, stacked_index: Shape) -> Tensor:
        """Return the weight of one layer (and expert), assembled from its shards.

        Args:
            key: Name of the tensor.
            stacked_index: Index along the stacked axes; () for a tensor without any.

        Raises:
            UserError: When a shard is missing.
        """
        whole = self.tensors[key]
        shape = whole.shape[len(stacked_index) :]
        offset = (*stacked_index, *(0 for _ in shape))
        stacked_shape = (*(1 for _ in stacked_index), *shape)
        shards = list(whole.shards_of(offset, stacked_shape))
        if len(shards) == 1 and shards[0].shape == stacked_shape:
            return self._load(shards[0]).reshape(shape)
        weight = torch.empty(stacked_shape, dtype=whole.dtype)
        self.fill(key, whole.shape, offset, weight)
        return weight.reshape(shape)

    @torch.no_grad()
    def fill(self, key: str, whole_shape: Shape, offset: Shape, target: Tensor) -> None:
        """Copy a part of a tensor, from `offset` on and of the target's shape, into the target.

        Args:
            key: Name of the tensor.
            whole_shape: The shape that it should have.
            offset: Where the part begins.
            target: Takes the part, rounded to its type.

        Raises:
            UserError: When the tensor or a shard is missing, or it has another shape.
        """
        whole = self.tensors.get(key)
        if whole is None or whole.shape != whole_shape:
            got = "none" if whole is None else f"shape {list(whole.shape)}"
            raise UserError(
                f"tensor {key}: got {got} in {self.path}, expected shape {list(whole_shape)}; the "
                "checkpoint is of another model, choose its recipe"
            )
        filled = 0
        for shard in whole.shards_of(offset, target.shape):
            starts = [max(a, b) for a, b in zip(offset, shard.offset, strict=True)]
            ends = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, target.shape, shard.offset, shard.shape, strict=True)
            ]
            part = self._load(shard)[_slices(starts, ends, shard.offset)]
            target[_slices(starts, ends, offset)] = part
            filled += part.numel()
        if filled != target.numel():
            raise UserError(
                f"tensor {key} at {list(offset)}: got shards of {filled} elements in {self.path}, "
                f"expected {target.numel()}; the checkpoint is incomplete, take an earlier one"
            )

    def read_object(self, key: str) -> Any:
        """Return an object of plain values and tensors.

        Args:
            key: Its unique name, as Megatron-Core's `ShardedObject.unique_key`.

        Raises:
            UserError: When it is missing or of any other class.
        """
        if key not in self._objects:
            raise UserError(
                f"object {key}: got none in {self.path}, expected one; the checkpoint is "
                "incomplete, take an earlier one"
            )
        stored = self._objects[key]
        with self._open(stored) as view:
            loaded = load_plain(view, self.path / stored.file)
        return loaded[0]

    def source_files(self) -> list[Path]:
        """Return the files that hold the weights."""
        return sorted({self.path / shard.file for shard in self._all_shards()})

    def _all_shards(self) -> Iterator[StoredShard]:
        for tensor in self.tensors.values():
            for group in tensor.shards.values():
                yield from group

    def _load(self, shard: StoredShard) -> Tensor:
        with self._open(shard) as view:
            loaded = load_plain(view, self.path / shard.file)
        if not isinstance(loaded, Tensor) or loaded.numel() != prod(shard.shape):
            raise UserError(
                f"{self.path / shard.file}: got other content than {METADATA} lists at byte "
                f"{shard.start}, expected a tensor of {prod(shard.shape)} elements; copy the "
                "checkpoint again or take an earlier one"
            )
        return loaded.reshape(shard.shape)

    @contextmanager
    def _open(self, part: StoredShard) -> Iterator[IO[bytes]]:
        with (self.path / part.file).open("rb") as file:
            # Prefetch the part instead of reading a little with every call.
            advice = os.POSIX_FADV_WILLNEED
            os.posix_fadvise(file.fileno(), part.start, part.size_bytes, advice)
            yield cast(IO[bytes], _create_file_view(file, part.start, part.size_bytes))


def _tensor(key: str, stored: TensorStorageMetadata, storage: dict[Any, Any]) -> NativeTensor:
    shards: dict[int, list[StoredShard]] = defaultdict(list)
    for chunk in stored.chunks:
        info = storage[MetadataIndex(key, chunk.offsets)]
        shard = StoredShard(
            tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length
        )
        shards[shard.offset[0] if shard.offset else 0].append(shard)
    return NativeTensor(tuple(stored.size), stored.properties.dtype, dict(shards))


def _object(info: _StorageInfo) -> StoredShard:
    return StoredShard((), (), info.relative_path, info.offset, info.length)


def _slices(starts: Sequence[int], ends: Sequence[int], origin: Shape) -> tuple[slice, ...]:
    bounds = zip(starts, ends, origin, strict=True)
    return tuple(slice(start - first, end - first) for start, end, first in bounds)
