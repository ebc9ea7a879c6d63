"""Completes checkpoints that were written file by file, without process groups."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_keye.checkpoint.storage_format import (
    CONFIG,
    CONFIG_TEXT,
    METADATA,
    Shape,
    WholeTensor,
    Written,
    WrittenObject,
    WrittenShard,
    metadata_of,
    object_bytes,
    write_object,
)

_OBJECTS = "objects.distcp"
_COMMON = "common_state/shard_0_1"


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
    tensors = {key: WholeTensor(shape, dtype) for key, shape in shapes.items()}
    written: dict[str, Iterable[Written]] = {**files}
    written[_OBJECTS] = _write_objects(folder, extra_states)
    (folder / METADATA).write_bytes(metadata_of(written, tensors))
    (folder / CONFIG).write_text(CONFIG_TEXT)


def _write_objects(folder: Path, extra_states: Iterable[str]) -> list[Written]:
    """Write Megatron's common state and one empty object that all linears share."""
    with (folder / _OBJECTS).open("wb") as file:
        common = write_object(file, _COMMON, object_bytes({"converted": True}))
        empty = write_object(file, "", object_bytes(None))
    shared = [WrittenObject(key, empty.start, empty.size_bytes) for key in extra_states]
    return [common, *shared]
