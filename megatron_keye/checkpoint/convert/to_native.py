# SPDX-License-Identifier: Apache-2.0
"""Fills the files of a native checkpoint from tensors of the released one."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_keye.checkpoint.convert.check_tensors import check_finite
from megatron_keye.checkpoint.convert.native_file import write_metadata
from megatron_keye.checkpoint.convert.one_thread import one_thread
from megatron_keye.checkpoint.convert.sources import TensorSource
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout, parameter_shapes
from megatron_keye.checkpoint.hf.weight_map import WeightMapping, weight_mappings
from megatron_keye.checkpoint.storage_format import WrittenShard, write_shard
from megatron_keye.config.model import ModelConfig
from megatron_keye.files.workers import Advance


@dataclass(frozen=True)
class NativeMaker:
    """Makes one file per layer, one for vision, one for embedding, final norm and output layer."""

    model: ModelConfig
    """Sizes."""
    layout: ExpertLayout
    """Expert layout of the source."""
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
        for mapping in weight_mappings(self.model, self.layout):
            numbers = prod(_native_shape(mapping, shapes))
            sizes[_file_of(mapping)] = (
                sizes.get(_file_of(mapping), 0) + numbers * self.dtype.itemsize
            )
        return sizes

    @one_thread()
    def fill(self, name: str, stream: BinaryIO, advance: Advance) -> Any:
        """Write one file; the record is the list of its shards."""
        record = []
        for mapping in weight_mappings(self.model, self.layout):
            if _file_of(mapping) == name:
                for shard in self._write(mapping, stream):
                    record.append(asdict(shard))
                    advance(prod(shard.shape) * self.dtype.itemsize)
        return record

    def finish(self, folder: Path, records: Mapping[str, Any]) -> None:
        """Write the metadata of all files.

        Args:
            folder: Their folder.
            records: What `fill` returned, by file.
        """
        files = {name: [_written(shard) for shard in record] for name, record in records.items()}
        write_metadata(folder, files, native_shapes(self.model), self.dtype)

    def _write(self, mapping: WeightMapping, stream: BinaryIO) -> Iterator[WrittenShard]:
        parts = [self._read(part.name, part.index) for part in mapping.parts]
        row = 0
        for shard in mapping.arrangement.join(parts):
            inner = (row, *(0 for _ in shard.shape[1:]))
            shape = (*(1 for _ in mapping.stacked_index), *shard.shape)
            yield write_shard(stream, mapping.key, (*mapping.stacked_index, *inner), shape, shard)
            row += shard.shape[0]

    def _read(self, name: str, index: int | None) -> Tensor:
        tensor = self.source.read(name, index)
        if self.checks_finite:
            check_finite(name, tensor)
        return tensor.to(self.dtype)


def native_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every native tensor by its key."""
    shapes = parameter_shapes(model)
    native: dict[str, tuple[int, ...]] = {}
    for mapping in weight_mappings(model, "fused"):
        if mapping.key not in native:
            native[mapping.key] = (*mapping.stacked_shape, *_native_shape(mapping, shapes))
    return native


def _native_shape(
    mapping: WeightMapping, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    parts = [shapes[part.name][0 if part.index is None else 1 :] for part in mapping.parts]
    return mapping.arrangement.native_shape(parts)


def _file_of(mapping: WeightMapping) -> str:
    if mapping.stacked_index:
        return f"layer-{mapping.stacked_index[0]:05d}.distcp"
    return "vision.distcp" if mapping.key.startswith("vision.") else "ends.distcp"


def _written(shard: dict[str, Any]) -> WrittenShard:
    return WrittenShard(
        **shard | {"offset": tuple(shard["offset"]), "shape": tuple(shard["shape"])}
    )
