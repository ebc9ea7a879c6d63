"""Writes checkpoints as training does, shard by shard and without process groups.

Each file is written on its own and leaves a list of its shards; the lists together become the
table that makes the folder a checkpoint.
"""

import io
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

Place = tuple[int, ...]
_OBJECTS = "objects.distcp"
_COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class Written:
    """A shard in a finished file."""

    key: str
    offset: Place
    shape: Place
    start: int
    size_bytes: int


def write_shard(stream: BinaryIO, key: str, offset: Place, shape: Place, shard: Tensor) -> Written:
    """Append one shard of a tensor.

    Args:
        stream: The file.
        key: Name of the whole tensor.
        offset: Where the shard begins in it.
        shape: Shape of the shard with the stacked axes.
        shard: Its numbers, of the same count.
    """
    start = stream.tell()
    data = shard.reshape(shape)
    if data.untyped_storage().nbytes() != data.nbytes or not data.is_contiguous():
        # torch.save writes a tensor's whole storage.
        data = data.clone(memory_format=torch.contiguous_format)
    torch.save(data, stream)
    return Written(key, offset, shape, start, stream.tell() - start)


def write_table(
    folder: Path,
    files: Mapping[str, Iterable[Written]],
    shapes: Mapping[str, Place],
    dtype: torch.dtype,
    extra_states: Iterable[str],
) -> None:
    """Write what turns finished files into a checkpoint.

    Args:
        folder: Holds the files.
        files: Shards by file name.
        shapes: Whole shape of each tensor.
        dtype: Type of all tensors.
        extra_states: Names of the empty objects that linears keep.
    """
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [])
        for key, shape in shapes.items()
    }
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, shards in files.items():
        for shard in shards:
            chunk = ChunkStorageMetadata(torch.Size(shard.offset), torch.Size(shard.shape))
            described[shard.key].chunks.append(chunk)
            index = MetadataIndex(shard.key, shard.offset)
            places[index] = _StorageInfo(name, shard.start, shard.size_bytes)
    for key, place in _write_objects(folder, extra_states).items():
        described[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = place
    metadata = Metadata(
        described,
        storage_data=places,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))


def _write_objects(folder: Path, extra_states: Iterable[str]) -> dict[str, _StorageInfo]:
    """Write Megatron's common state and one empty object that all linears share."""
    places: dict[str, _StorageInfo] = {}
    with (folder / _OBJECTS).open("wb") as file:
        common = _saved([{"converted": True}])
        places[_COMMON] = _StorageInfo(_OBJECTS, file.tell(), file.write(common))
        empty = _StorageInfo(_OBJECTS, file.tell(), file.write(_saved([None])))
    return places | dict.fromkeys(extra_states, empty)


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
