"""Reads weights out of a checkpoint that training saved on any grid, part by part.

Training's format is torch.distributed.checkpoint's: pieces of tensors in *.distcp files and a
table of them in .metadata. Reading it directly needs no process group and no model. The table is
a pickle: open only checkpoints of your own.
"""

import os
import pickle
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

Place = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A stored part of a tensor."""

    offset: Place
    """Where it begins in the whole tensor."""
    shape: Place
    """Its shape."""
    file: str
    """Name of its file."""
    start: int
    """First byte in the file."""
    size_bytes: int
    """Bytes that it takes there."""


@dataclass(frozen=True)
class NativeTensor:
    """A whole tensor, layers and experts stacked."""

    shape: Place
    """Its shape."""
    dtype: torch.dtype
    """Its type."""
    pieces: dict[int, list[Piece]]
    """Pieces by their place along dim 0."""


class NativeFolder:
    """All weights of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read the table and check that every file is there in full.

        Raises:
            ValueError: When the folder is no complete checkpoint or a file is cut short.
        """
        table = folder / ".metadata"
        if not table.is_file() or not (folder / "metadata.json").is_file():
            raise ValueError(
                f"{folder}: got no .metadata with metadata.json, expected a complete native "
                "checkpoint (.../checkpoints/step-NNNNNNNN, or what convert_checkpoint.py made); "
                "check --native or training.checkpoint.weights"
            )
        self.path = folder
        with table.open("rb") as file:
            try:
                metadata = pickle.load(file)
            except (pickle.UnpicklingError, EOFError) as error:
                raise ValueError(
                    f"{table}: got {error}, expected a readable table; it was cut short, copy the "
                    "checkpoint again"
                ) from error
        self.tensors = {
            key: _tensor(key, stored, metadata.storage_data)
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self._check_files()

    def read(self, key: str, lead: Place) -> Tensor:
        """Put the weight of one layer (and expert) together from its pieces.

        Args:
            key: Name of the tensor.
            lead: Place along the stacked axes; () for a tensor without any.

        Raises:
            ValueError: When a piece is missing.
        """
        whole = self.tensors[key]
        shape = whole.shape[len(lead) :]
        near = self._pieces_at(whole, lead)
        if len(near) == 1 and near[0].shape[len(lead) :] == shape:
            return self._load(near[0]).reshape(shape)
        joined = torch.empty(shape, dtype=whole.dtype)
        filled = 0
        for piece in near:
            at = piece.offset[len(lead) :]
            sizes = piece.shape[len(lead) :]
            region = tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))
            joined[region] = self._load(piece).reshape(sizes)
            filled += prod(sizes)
        if filled != prod(shape):
            raise ValueError(
                f"tensor {key} at {list(lead)}: got pieces of {filled} numbers in {self.path}, "
                f"expected {prod(shape)}; the checkpoint is incomplete, take an earlier one"
            )
        return joined

    def source_files(self) -> list[Path]:
        """Return the files that hold the weights."""
        pieces = (p for t in self.tensors.values() for group in t.pieces.values() for p in group)
        return sorted({self.path / piece.file for piece in pieces})

    def _pieces_at(self, whole: NativeTensor, lead: Place) -> list[Piece]:
        if not lead:
            return [piece for group in whole.pieces.values() for piece in group]
        near = whole.pieces.get(lead[0], [])
        return [piece for piece in near if piece.offset[: len(lead)] == lead]

    def _load(self, piece: Piece) -> Tensor:
        with (self.path / piece.file).open("rb") as file:
            # Read from disk at once instead of a little with every call.
            advice = os.POSIX_FADV_WILLNEED
            os.posix_fadvise(file.fileno(), piece.start, piece.size_bytes, advice)
            view = cast(IO[bytes], _create_file_view(file, piece.start, piece.size_bytes))
            loaded: Tensor = torch.load(view, map_location="cpu", weights_only=True)
        return loaded

    def _check_files(self) -> None:
        needed: dict[str, int] = defaultdict(int)
        for tensor in self.tensors.values():
            for group in tensor.pieces.values():
                for piece in group:
                    needed[piece.file] = max(needed[piece.file], piece.start + piece.size_bytes)
        for name, size in needed.items():
            file = self.path / name
            got = file.stat().st_size if file.is_file() else 0
            if got < size:
                raise ValueError(
                    f"{file}: got {got} bytes, expected at least {size}; the file was cut short "
                    "or is missing, copy the checkpoint again"
                )


def _tensor(key: str, stored: TensorStorageMetadata, storage: dict[Any, Any]) -> NativeTensor:
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for chunk in stored.chunks:
        info = storage[MetadataIndex(key, chunk.offsets)]
        piece = Piece(
            tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length
        )
        pieces[piece.offset[0] if piece.offset else 0].append(piece)
    return NativeTensor(tuple(stored.size), stored.properties.dtype, dict(pieces))
