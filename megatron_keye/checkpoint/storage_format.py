# SPDX-License-Identifier: Apache-2.0
"""The native format on disk: what training and conversions write alike.

It is torch.distributed.checkpoint's: parts of tensors and objects one behind the other in *.distcp
files, listed in .metadata, a pickle of torch's private `_StorageInfo`. Megatron-Core reads it.
"""

import io
import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
CONFIG, METADATA = "metadata.json", ".metadata"
CONFIG_TEXT = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
"""Content of metadata.json, by which Megatron-Core knows the format."""


@dataclass(frozen=True)
class WrittenShard:
    """A part of a tensor in a finished file."""

    key: str
    """Name of the whole tensor."""
    offset: Shape
    """Where the part begins in it."""
    shape: Shape
    """Shape of the part, with the stacked axes."""
    start: int
    """First byte in the file."""
    size_bytes: int
    """Bytes in the file."""


@dataclass(frozen=True)
class WrittenObject:
    """An object in a finished file."""

    key: str
    """Its name."""
    start: int
    """First byte in the file."""
    size_bytes: int
    """Bytes in the file."""


Written = WrittenShard | WrittenObject


@dataclass(frozen=True)
class WholeTensor:
    """A tensor, all shards together."""

    shape: Shape
    """Its shape, with the stacked axes."""
    dtype: torch.dtype
    """Its type."""


def write_shard(
    stream: BinaryIO, key: str, offset: Shape, shape: Shape, shard: Tensor
) -> WrittenShard:
    """Append one shard of a tensor.

    Args:
        stream: The file.
        key: Name of the whole tensor.
        offset: Where the shard begins in it.
        shape: Shape of the shard with the stacked axes.
        shard: Its elements, in any shape, on any device.
    """
    start = stream.tell()
    data = shard.detach().cpu().reshape(shape)
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


def write_object(stream: BinaryIO, key: str, content: bytes) -> WrittenObject:
    """Append an object that `object_bytes` made."""
    start = stream.tell()
    stream.write(content)
    return WrittenObject(key, start, len(content))


def object_bytes(value: object) -> bytes:
    """Return an object as Megatron-Core reads it: in a list of one."""
    buffer = io.BytesIO()
    torch.save([value], buffer)
    return buffer.getvalue()


def metadata_of(
    files: Mapping[str, Iterable[Written]], tensors: Mapping[str, WholeTensor]
) -> bytes:
    """Return the content of .metadata.

    Args:
        files: What lies in each file, by its name.
        tensors: All whole tensors by their names.
    """
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(each.dtype), torch.Size(each.shape), [])
        for key, each in tensors.items()
    }
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, written in files.items():
        for part in written:
            index = MetadataIndex(part.key)
            if isinstance(part, WrittenShard):
                chunk = ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape))
                entries[part.key].chunks.append(chunk)
                index = MetadataIndex(part.key, part.offset)
            else:
                entries[part.key] = BytesStorageMetadata()
            storage[index] = _StorageInfo(name, part.start, part.size_bytes)
    return pickle.dumps(
        Metadata(
            entries,
            storage_data=storage,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
    )
