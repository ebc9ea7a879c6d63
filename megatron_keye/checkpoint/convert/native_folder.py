"""Reads single weights from a checkpoint that training saved on any grid.

The format is torch.distributed.checkpoint's: shards of tensors in *.distcp files, listed in the
pickle .metadata. Reading it directly needs no process group and no model, but relies on torch's
private metadata: `_StorageInfo` in that pickle, and `_create_file_view`. Unpickling runs code:
open only checkpoints that you trust.
"""

import os
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_keye.checkpoint.manifest import check_sizes
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


class NativeFolder:
    """All weights of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata and check that every file is there with its size.

        Raises:
            UserError: When the folder is no whole checkpoint.
        """
        check_sizes(folder)
        metadata_file = folder / METADATA
        self.path = folder
        with metadata_file.open("rb") as file:
            try:
                metadata = pickle.load(file)
            except (pickle.UnpicklingError, EOFError) as error:
                raise UserError(
                    f"{metadata_file}: got {error}, expected a readable pickle; it was cut short, "
                    "copy the checkpoint again"
                ) from error
        self.tensors = {
            key: _tensor(key, stored, metadata.storage_data)
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not key.startswith("optimizer.")
        }

    def read(self, key: str, stacked_index: Shape) -> Tensor:
        """Assemble the weight of one layer (and expert) from its shards.

        Args:
            key: Name of the tensor.
            stacked_index: Index along the stacked axes; () for a tensor without any.

        Raises:
            UserError: When a shard is missing.
        """
        whole = self.tensors[key]
        shape = whole.shape[len(stacked_index) :]
        shards = self._shards_at(whole, stacked_index)
        if len(shards) == 1 and shards[0].shape[len(stacked_index) :] == shape:
            return self._load(shards[0]).reshape(shape)
        weight = torch.empty(shape, dtype=whole.dtype)
        filled = 0
        for shard in shards:
            offset = shard.offset[len(stacked_index) :]
            sizes = shard.shape[len(stacked_index) :]
            region = tuple(slice(a, a + n) for a, n in zip(offset, sizes, strict=True))
            weight[region] = self._load(shard).reshape(sizes)
            filled += prod(sizes)
        if filled != prod(shape):
            raise UserError(
                f"tensor {key} at {list(stacked_index)}: got shards of {filled} elements in "
                f"{self.path}, expected {prod(shape)}; the checkpoint is incomplete, take an "
                "earlier one"
            )
        return weight

    def source_files(self) -> list[Path]:
        """Return the files that hold the weights."""
        return sorted({self.path / shard.file for shard in self._all_shards()})

    def _all_shards(self) -> Iterator[StoredShard]:
        for tensor in self.tensors.values():
            for group in tensor.shards.values():
                yield from group

    def _shards_at(self, whole: NativeTensor, stacked_index: Shape) -> list[StoredShard]:
        if not stacked_index:
            return [shard for group in whole.shards.values() for shard in group]
        of_layer = whole.shards.get(stacked_index[0], [])
        return [shard for shard in of_layer if shard.offset[: len(stacked_index)] == stacked_index]

    def _load(self, shard: StoredShard) -> Tensor:
        with (self.path / shard.file).open("rb") as file:
            # Prefetch the shard instead of reading a little with every call.
            advice = os.POSIX_FADV_WILLNEED
            os.posix_fadvise(file.fileno(), shard.start, shard.size_bytes, advice)
            view = cast(IO[bytes], _create_file_view(file, shard.start, shard.size_bytes))
            loaded: Tensor = torch.load(view, map_location="cpu", weights_only=True)
        return loaded


def _tensor(key: str, stored: TensorStorageMetadata, storage: dict[Any, Any]) -> NativeTensor:
    shards: dict[int, list[StoredShard]] = defaultdict(list)
    for chunk in stored.chunks:
        info = storage[MetadataIndex(key, chunk.offsets)]
        shard = StoredShard(
            tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length
        )
        shards[shard.offset[0] if shard.offset else 0].append(shard)
    return NativeTensor(tuple(stored.size), stored.properties.dtype, dict(shards))
