"""Writes checkpoints in training's format, shard by shard and without process groups.

Each file is written on its own and leaves a list of its shards; .metadata, which makes the folder
a checkpoint, lists them all. It is a pickle of torch's private metadata, `_StorageInfo`.
"""

import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_keye.checkpoint.storage_format import CONFIG, CONFIG_TEXT, METADATA, write_tensor

Shape = tuple[int, ...]
_OBJECTS = "objects.distcp"
_COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class WrittenShard:
    """A shard in a finished file."""

    key: str
    offset: Shape
    shape: Shape
    start: int
    size_bytes: int


def write_shard(
    stream: BinaryIO, key: str, offset: Shape, shape: Shape, shard: Tensor
) -> WrittenShard:
    """Append one shard of a tensor.

    Args:
        stream: The file.
        key: Name of the whole tensor.
        offset: Where the shard begins in it.
        shape: Shape of the shard with the stacked axes.
        shard: Its elements, in any shape.
    """
    start, size_bytes = write_tensor(stream, shard.reshape(shape))
    return WrittenShard(key, offset, shape, start, size_bytes)


def write_metadata(
    folder: Path,
    files: Mapping[str, Iterable[WrittenShard]],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    extra_states: Iterable[str],
) -> None:
    """Write .metadata and metadata.json, which make finished files a checkpoint.

    Args:
        folder: Folder of the files.
        files: Shards by file name.
        shapes: Whole shape of each tensor.
        dtype: Type of all tensors.
        extra_states: Names of the empty objects that linears keep.
    """
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [])
        for key, shape in shapes.items()
    }
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, shards in files.items():
        for shard in shards:
            chunk = ChunkStorageMetadata(torch.Size(shard.offset), torch.Size(shard.shape))
            entries[shard.key].chunks.append(chunk)
            index = MetadataIndex(shard.key, shard.offset)
            storage[index] = _StorageInfo(name, shard.start, shard.size_bytes)
    for key, info in _write_objects(folder, extra_states).items():
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = info
    metadata = Metadata(
        entries,
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    with (folder / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
    (folder / CONFIG).write_text(CONFIG_TEXT)


def _write_objects(folder: Path, extra_states: Iterable[str]) -> dict[str, _StorageInfo]:
    """Write Megatron's common state and one empty object that all linears share."""
    storage: dict[str, _StorageInfo] = {}
    with (folder / _OBJECTS).open("wb") as file:
        common = _saved([{"converted": True}])
        storage[_COMMON] = _StorageInfo(_OBJECTS, file.tell(), file.write(common))
        empty = _StorageInfo(_OBJECTS, file.tell(), file.write(_saved([None])))
    return storage | dict.fromkeys(extra_states, empty)


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
