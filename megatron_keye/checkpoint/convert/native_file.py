# SPDX-License-Identifier: Apache-2.0
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
) -> None:
    """Write .metadata and metadata.json, which make finished files a checkpoint.

    Args:
        folder: Folder of the files.
        files: Shards by file name.
        shapes: Whole shape of each tensor.
        dtype: Type of all tensors.
    """
    tensors = {key: WholeTensor(shape, dtype) for key, shape in shapes.items()}
    written: dict[str, Iterable[Written]] = {**files, _OBJECTS: [_write_common(folder)]}
    (folder / METADATA).write_bytes(metadata_of(written, tensors))
    (folder / CONFIG).write_text(CONFIG_TEXT)


def _write_common(folder: Path) -> WrittenObject:
    """Write the common state, which Megatron's own loading asks for."""
    with (folder / _OBJECTS).open("wb") as file:
        return write_object(file, _COMMON, object_bytes({"converted": True}))
