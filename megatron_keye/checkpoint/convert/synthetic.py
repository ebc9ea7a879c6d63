# SPDX-License-Identifier: Apache-2.0
"""Writes released checkpoints of random numbers, for tests and benchmarks of conversions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_keye.checkpoint.hf.config import CONFIG
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout, parameter_shapes
from megatron_keye.checkpoint.hf.safetensors_file import (
    file_name,
    make_header,
    split_files,
    write_blocks,
    write_index,
)
from megatron_keye.checkpoint.hf.write_config import make_config
from megatron_keye.config.model import ModelConfig

Shape = tuple[int, ...]


def write_synthetic(
    folder: Path,
    model: ModelConfig,
    *,
    layout: ExpertLayout = "fused",
    dtype: torch.dtype = torch.bfloat16,
    file_bytes: int = 2_000_000_000,
) -> int:
    """Write a checkpoint of normal numbers and return the bytes of its tensors.

    Args:
        folder: Folder to make.
        model: Sizes.
        layout: Expert layout.
        dtype: Type of all tensors.
        file_bytes: Most bytes of one file, unless one tensor is larger.
    """
    shapes = parameter_shapes(model, layout)
    total = write_noise(folder, shapes, dtype=dtype, file_bytes=file_bytes)
    config = make_config(model, str(dtype).removeprefix("torch."), {})
    (folder / CONFIG).write_text(json.dumps(config))
    return total


def write_noise(
    folder: Path, shapes: Mapping[str, Shape], *, dtype: torch.dtype, file_bytes: int
) -> int:
    """Write tensors of normal numbers into files with an index; return the number of bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    groups = split_files(shapes, dtype, file_bytes)
    total = 0
    noise = torch.randn(1 << 20, generator=generator).to(dtype)
    for number, group in enumerate(groups, start=1):
        path = folder / file_name(number, len(groups))
        with path.open("wb") as stream:
            stream.write(make_header(group, dtype))
            for name, shape in group.items():
                files[name] = path.name
                total += _fill(stream, torch.Size(shape).numel(), noise, generator)
    write_index(folder, files, total)
    return total


def _fill(stream: BinaryIO, count: int, noise: Tensor, generator: torch.Generator) -> int:
    """Fill a tensor with repeated noise from a random start."""
    start = int(torch.randint(noise.numel(), (), generator=generator))
    written = 0
    while count:
        block = noise[start : start + count]
        written += write_blocks(stream, [block])
        count -= block.numel()
        start = 0
    return written
