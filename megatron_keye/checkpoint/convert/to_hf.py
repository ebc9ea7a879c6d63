# SPDX-License-Identifier: Apache-2.0
"""Fills the files of a released checkpoint from a native one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from megatron_keye.checkpoint.convert.check_tensors import check_finite
from megatron_keye.checkpoint.convert.one_thread import one_thread
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout, parameter_shapes
from megatron_keye.checkpoint.hf.safetensors_file import (
    file_name,
    make_header,
    split_files,
    write_blocks,
    write_index,
)
from megatron_keye.checkpoint.hf.weight_map import HfPart, WeightMapping, weight_mappings
from megatron_keye.config.model import ModelConfig
from megatron_keye.files.workers import Advance


class NativeSource(Protocol):
    """Gives each native weight, as stored or changed on the way; can be pickled."""

    def read(self, key: str, stacked_index: tuple[int, ...]) -> Tensor:
        """Return the weight of one layer (and expert); () for a tensor without stacked axes."""


@dataclass(frozen=True)
class HfMaker:
    """Makes safetensors files of about one size."""

    model: ModelConfig
    """Sizes."""
    layout: ExpertLayout
    """Expert layout to write."""
    native: NativeSource
    """Source of the weights."""
    dtype: torch.dtype
    """Type to write."""
    checks_finite: bool
    """Whether NaN and Inf are refused."""
    file_bytes: int
    """Most bytes of one file, unless one tensor is larger."""
    _last: dict[WeightMapping, list[Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """Names of the tensors of each file, in order."""
        groups = split_files(self._shapes, self.dtype, self.file_bytes)
        return {
            file_name(number, len(groups)): list(group)
            for number, group in enumerate(groups, start=1)
        }

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of tensors in each file, by name."""
        return {
            file: sum(prod(self._shapes[name]) for name in names) * self.dtype.itemsize
            for file, names in self.files.items()
        }

    @one_thread()
    def fill(self, name: str, stream: BinaryIO, advance: Advance) -> Any:
        """Write one file; there is nothing to record."""
        names = self.files[name]
        stream.write(make_header({each: self._shapes[each] for each in names}, self.dtype))
        for each in names:
            for block in self._blocks(each):
                advance(write_blocks(stream, [block]))
        self._last.clear()

    def finish(self, folder: Path, records: Mapping[str, Any]) -> None:
        """Write the index over all files."""
        file_of = {name: file for file in records for name in self.files[file]}
        write_index(folder, file_of, sum(self.file_sizes().values()))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.model, self.layout)

    @cached_property
    def _mappings(self) -> dict[HfPart, tuple[WeightMapping, int]]:
        """The mapping that gives each part of a tensor, and the part's position in it."""
        return {
            part: (mapping, position)
            for mapping in weight_mappings(self.model, self.layout)
            for position, part in enumerate(mapping.parts)
        }

    def _blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in blocks, in the order of the file."""
        if HfPart(name) in self._mappings:
            yield self._part(HfPart(name))
            return
        for index in range(self._shapes[name][0]):
            yield self._part(HfPart(name, index))

    def _part(self, part: HfPart) -> Tensor:
        mapping, position = self._mappings[part]
        if mapping not in self._last:
            # The last weight is cached, since q, k and v come from one.
            self._last.clear()
            native = self.native.read(mapping.key, mapping.stacked_index)
            if self.checks_finite:
                check_finite(f"{mapping.key} at {list(mapping.stacked_index)}", native)
            self._last[mapping] = mapping.arrangement.split(native.to(self.dtype))
        return self._last[mapping][position]
