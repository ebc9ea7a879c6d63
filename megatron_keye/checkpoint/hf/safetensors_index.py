# SPDX-License-Identifier: Apache-2.0
"""Reads folders of safetensors files: headers checked together, tensors memory-mapped.

Own code instead of the safetensors package, whose readers keep a whole file mapped: here a memory
map lives as long as its tensor, so that memory stays small whatever the checkpoint's size.
"""

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_keye.checkpoint.hf.folder_kinds import LFS_POINTER, check_folder
from megatron_keye.errors import UserError

INDEX = "model.safetensors.index.json"
_HEADER_LENGTH_BYTES = 8
_NUMBERED = re.compile(r"(.*?)(\d+)-of-(\d+)\.safetensors")
_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    # Read by no conversion, but named when they are refused.
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
"""Safetensors' name of a type."""


@dataclass(frozen=True)
class Entry:
    """Location of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, index: int | None = None) -> Tensor:
        """Map the tensor, or one slice along its first dimension, into memory.

        Args:
            index: Which slice; None for the whole.

        Returns:
            A tensor that must not be written to; the memory map ends with it.
        """
        shape, start, size = self.shape, self.start, self.size_bytes
        if index is not None:
            shape, size = shape[1:], size // shape[0]
            start += index * size
        if not size:
            return torch.empty(shape, dtype=self.dtype)
        first = start - start % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            # Copy-on-write, because torch expects a writable buffer.
            mapped = mmap.mmap(
                file.fileno(), start - first + size, offset=first, access=mmap.ACCESS_COPY
            )
        # Prefetch instead of reading a little at every page fault.
        mapped.madvise(mmap.MADV_WILLNEED)
        flat = torch.frombuffer(mapped, dtype=self.dtype, count=prod(shape), offset=start - first)
        return flat.view(shape)


def open_folder(folder: Path) -> dict[str, Entry]:
    """Read all headers of a checkpoint folder and check them against its index and each other.

    Args:
        folder: Holds *.safetensors, with an index when there are several.

    Returns:
        The entry of each tensor.

    Raises:
        UserError: For a folder without tensors or of another kind, a file that is absent, cut
            short or broken, a tensor that two files hold, or an index that disagrees with them.
    """
    check_folder(folder)
    mapping = _read_index(folder)
    files = sorted(folder.glob("*.safetensors"))
    _check_all_there(folder, files, mapping)
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise UserError(
                    f"tensor {name}: got it in {entries[name].file.name} and in {file.name} of "
                    f"{folder}, expected it once; remove the file that the index does not name"
                )
            entries[name] = entry
    if mapping is not None:
        _check_index(folder, entries, mapping)
    return entries


def read_header(file: Path) -> dict[str, Entry]:
    """Return the entry of each tensor of one file.

    Raises:
        UserError: When the header is broken or the file is shorter than it states.
    """
    if not file.is_file():
        raise UserError(f"{file}: got a link to no file, expected safetensors; download it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{file}: got the pointer of git LFS, expected the file that it stands for; run "
                "git lfs pull in the folder, or download with the Hugging Face hub's client"
            )
        stream.seek(0)
        length = int.from_bytes(stream.read(_HEADER_LENGTH_BYTES), "little")
        body = _HEADER_LENGTH_BYTES + length
        if size < body or length < 2:
            raise _cut_short(file, "header", size, body)
        header = stream.read(length)
    try:
        described = json.loads(header)
        entries = dict(_entries(file, body, described))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: got a header that is not safetensors ({error}), expected JSON of names, "
            "types, shapes and offsets; copy the file again"
        ) from error
    for name, entry in entries.items():
        if entry.start + entry.size_bytes > size:
            raise _cut_short(file, f"tensor {name}", size, entry.start + entry.size_bytes)
    return entries


def _entries(file: Path, body: int, described: dict[str, Any]) -> Iterator[tuple[str, Entry]]:
    for name, info in described.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in _TYPES:
            raise ValueError(f"tensor {name} has the unknown type {info['dtype']}")
        first, end = info["data_offsets"]
        entry = Entry(file, _TYPES[info["dtype"]], tuple(info["shape"]), body + first)
        if entry.size_bytes != end - first:
            raise ValueError(
                f"tensor {name} of {info['dtype']} {info['shape']} takes {entry.size_bytes} "
                f"bytes, but its offsets leave {end - first}"
            )
        yield name, entry


def _cut_short(file: Path, what: str, size: int, expected: int) -> UserError:
    return UserError(
        f"{file}: got {size} bytes, expected at least {expected} to hold {what}; the file was cut "
        "short, copy it again"
    )


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return the file of each tensor; None for a folder without an index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        mapping: dict[str, str] = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: got no readable weight_map ({error}), expected JSON with one; copy it again"
        ) from error
    return mapping


def _check_all_there(folder: Path, files: list[Path], mapping: dict[str, str] | None) -> None:
    """Raise unless all files are there that the index, or their numbering, tells of."""
    numbered = [match for file in files if (match := _NUMBERED.fullmatch(file.name))]
    wanted = {
        f"{match[1]}{number:0{len(match[2])}d}-of-{match[3]}.safetensors"
        for match in numbered
        for number in range(1, int(match[3]) + 1)
    }
    if mapping is not None:
        wanted = set(mapping.values())
    # A link into a cache whose target was removed is no file.
    absent = sorted(name for name in wanted if not (folder / name).is_file())
    if absent:
        source = "its index names" if mapping is not None else "its numbering tells of"
        raise UserError(
            f"{folder}: got {len(wanted) - len(absent)} of the {len(wanted)} files that {source}, "
            f"expected all; download {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}"
        )


def _check_index(folder: Path, entries: dict[str, Entry], mapping: dict[str, str]) -> None:
    for name, file in mapping.items():
        held = entries[name].file.name if name in entries else "no file"
        if held != file:
            raise UserError(
                f"tensor {name}: got it in {held} of {folder}, expected it in {file} by {INDEX}; "
                "copy the file again or correct the index"
            )
    for name, entry in entries.items():
        if name not in mapping:
            raise UserError(
                f"tensor {name}: got it in {entry.file.name}, expected it in {INDEX} too; copy "
                "the index again or remove the file"
            )
