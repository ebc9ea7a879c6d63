"""Writes checkpoints in training's format, shard by shard and without process groups.

Each file is written on its own and leaves a list of its shards; .metadata, which makes the folder
a checkpoint, lists them all. It is a pickle of torch's private metadata, `_StorageInfo`.
"""

import json
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
    start = stream.tell()
    data = shard.reshape(shape)
    if data.untyped_storage().nbytes() != data.nbytes or not data.is_contiguous():
        # torch.save writes a tensor's whole storage.
        data = data.clone(memory_format=torch.contiguous_format)
    checksums = torch.serialization.get_crc32_options()
    # torch.load verifies no checksums, so computing them would be wasted time.
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(data, stream)
    finally:
        torch.serialization.set_crc32_options(checksums)
    return WrittenShard(key, offset, shape, start, stream.tell() - start)


def write_metadata(
    folder: Path,
    files: Mapping[str, Iterable[WrittenShard]],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
) -> None:
    """Write .metadata and metadata.json, which make finished files a checkpoint.

    Args:
        folder: Folder of the files.
        files: Shards by file name.
        shapes: Whole shape of each tensor.
        dtype: Type of all tensors.
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
    entries[_COMMON] = BytesStorageMetadata()
    storage[MetadataIndex(_COMMON)] = _write_common(folder)
    metadata = Metadata(
        entries,
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))


def _write_common(folder: Path) -> _StorageInfo:
    """Write the common state, which Megatron's own loading asks for."""
    with (folder / _OBJECTS).open("wb") as file:
        torch.save([{"converted": True}], file)
        return _StorageInfo(_OBJECTS, 0, file.tell())
