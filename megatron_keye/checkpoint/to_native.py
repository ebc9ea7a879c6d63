"""Fills the files of a native checkpoint from tensors of the released one."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_keye.checkpoint.check_tensors import check_finite
from megatron_keye.checkpoint.file_workers import Advance
from megatron_keye.checkpoint.native_file import Written, write_piece, write_table
from megatron_keye.checkpoint.parameter_shapes import ExpertLayout, parameter_shapes
from megatron_keye.checkpoint.sources import TensorSource
from megatron_keye.checkpoint.weight_map import Link, links
from megatron_keye.config.model import ModelConfig


@dataclass(frozen=True)
class NativeMaker:
    """Makes one file a layer, one of what stands before and after them, one of vision."""

    model: ModelConfig
    """Sizes."""
    layout: ExpertLayout
    """How the source holds experts."""
    source: TensorSource
    """Gives the tensors."""
    dtype: torch.dtype
    """Type to write."""
    checks_finite: bool
    """Whether NaN and Inf are refused."""

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of tensors in each file, by name."""
        shapes = parameter_shapes(self.model, self.layout)
        sizes: dict[str, int] = {}
        for link in links(self.model, self.layout):
            numbers = prod(_native_shape(link, shapes))
            sizes[_file_of(link)] = sizes.get(_file_of(link), 0) + numbers * self.dtype.itemsize
        return sizes

    def fill(self, name: str, stream: BinaryIO, advance: Advance) -> Any:
        """Write one file; the record is the list of its pieces."""
        record = []
        for link in links(self.model, self.layout):
            if _file_of(link) == name:
                for piece in self._write(link, stream):
                    record.append(asdict(piece))
                    advance(prod(piece.shape) * self.dtype.itemsize)
        return record

    def finish(self, folder: Path, records: Mapping[str, Any]) -> None:
        """Write the table over all files.

        Args:
            folder: Holds them.
            records: What `fill` returned, by file.
        """
        shapes = parameter_shapes(self.model, self.layout)
        files = {name: [_written(piece) for piece in record] for name, record in records.items()}
        native: dict[str, tuple[int, ...]] = {}
        extra = []
        for link in links(self.model, self.layout):
            if link.key not in native:
                native[link.key] = (*link.lead_shape, *_native_shape(link, shapes))
            if link.extra_state:
                extra.append(link.extra_state)
        write_table(folder, files, native, self.dtype, extra)

    def _write(self, link: Link, stream: BinaryIO) -> Iterator[Written]:
        parts = [self._read(part.name, part.index) for part in link.parts]
        row = 0
        for piece in link.arrangement.join(parts):
            inner = (row, *(0 for _ in piece.shape[1:]))
            shape = (*(1 for _ in link.lead), *piece.shape)
            yield write_piece(stream, link.key, (*link.lead, *inner), shape, piece)
            row += piece.shape[0]

    def _read(self, name: str, index: int | None) -> Tensor:
        tensor = self.source.read(name, index)
        if self.checks_finite:
            check_finite(name, tensor)
        return tensor.to(self.dtype)


def native_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every native tensor by its key."""
    shapes = parameter_shapes(model)
    native: dict[str, tuple[int, ...]] = {}
    for link in links(model, "fused"):
        if link.key not in native:
            native[link.key] = (*link.lead_shape, *_native_shape(link, shapes))
    return native


def _native_shape(link: Link, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    parts = [shapes[part.name][0 if part.index is None else 1 :] for part in link.parts]
    return link.arrangement.native_shape(parts)


def _file_of(link: Link) -> str:
    if link.lead:
        return f"layer-{link.lead[0]:05d}.distcp"
    return "vision.distcp" if link.key.startswith("vision.") else "ends.distcp"


def _written(piece: dict[str, Any]) -> Written:
    return Written(**piece | {"offset": tuple(piece["offset"]), "shape": tuple(piece["shape"])})
