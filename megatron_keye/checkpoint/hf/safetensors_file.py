# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files tensor by tensor, with one block in memory at a time."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_keye.checkpoint.hf.safetensors_index import INDEX, TYPE_NAMES

_ALIGNMENT = 8
"""The data begins at a multiple of this, as the format recommends."""


def make_header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Return the bytes before the data of a file.

    Args:
        shapes: Its tensors, in order.
        dtype: Their type.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": TYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": [first, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def split_files(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, file_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Split a checkpoint into files without reordering it.

    Args:
        shapes: All tensors.
        dtype: Their type.
        file_bytes: Most bytes of one file, unless one tensor is larger.
    """
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = prod(shape) * dtype.itemsize
        if groups[-1] and size + num_bytes > file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += num_bytes
    return groups


def file_name(number: int, count: int) -> str:
    """Return Hugging Face's name of the `number`-th of `count` files, from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_blocks(stream: BinaryIO, blocks: Iterable[Tensor]) -> int:
    """Append tensors to a file and return the number of bytes."""
    total = 0
    for block in blocks:
        data = block.contiguous().view(-1).view(torch.uint8).numpy()
        stream.write(memoryview(data))
        total += data.nbytes
    return total


def write_index(folder: Path, files: Mapping[str, str], size_bytes: int) -> None:
    """Write the index of a folder.

    Args:
        folder: The checkpoint.
        files: File of each tensor.
        size_bytes: Bytes of all tensors.
    """
    index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(files)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
