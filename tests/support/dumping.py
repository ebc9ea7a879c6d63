# SPDX-License-Identifier: Apache-2.0
"""Dumps of tiny checkpoints by the library and by transformers, and inputs of both."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_keye.checkpoint.hf.folder import HfFolder, open_hf
from megatron_keye.checkpoint.training_checkpoint import Progress, save
from megatron_keye.model import build_model
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.random import seed_rank
from megatron_keye.verify.dump import dump
from megatron_keye.verify.dump_inputs import inputs_from_arrays
from megatron_keye.verify.one_process import OneProcessModel, Precision
from megatron_keye.verify.qwen3_moe import run_qwen3_moe
from tests.support.hf_checkpoint import END, IMAGE, PATCH, START, VIDEO
from tests.support.numpy_model import Row
from tests.support.ranks import run_on_ranks

Arrays = dict[str, NDArray[Any]]


def dump_folder(
    folder: Path, inputs: Arrays, precision: Precision = "fp64", *, gradients: bool = False
) -> Arrays:
    """Return the library's dump of a Hugging Face folder, computed in another process."""
    dumped: Arrays = run_on_ranks(1, _dump, folder, inputs, precision, gradients)[0]
    return dumped


def dump_transformers(folder: Path, inputs: Arrays, precision: Precision) -> Arrays:
    """Return the dump of transformers for a Hugging Face folder."""
    dumped: Arrays = run_on_ranks(1, _dump_transformers, folder, inputs, precision)[0]
    return dumped


def save_native(folder: Path, to: Path) -> Path:
    """Save the weights of a Hugging Face folder as a native checkpoint and return its path."""
    saved: Path = run_on_ranks(1, _save_native, folder, to)[0]
    return saved


def mixed_inputs(seed: int = 1) -> Arrays:
    """Return inputs of two documents, with targets: one has an image and two frames, one text."""
    generator = np.random.default_rng(seed)

    def text(length: int) -> list[int]:
        tokens: list[int] = generator.integers(0, 90, length).tolist()
        return tokens

    def picture(token: int, count: int) -> list[int]:
        return [START, *[token] * count, END]

    first = [*text(5), *picture(IMAGE, 6), *text(4), *picture(VIDEO, 2), 7, *picture(VIDEO, 2)]
    token_ids = np.array([*first, *text(3), *text(9)])
    length = len(token_ids)
    is_target = generator.random(length) < 0.5
    return {
        "input_ids": token_ids,
        "pixel_values": _patches(generator, 24),
        "image_grid_thw": np.array([[1, 4, 6]]),
        "pixel_values_videos": _patches(generator, 16),
        "video_grid_thw": np.array([[1, 2, 4], [1, 4, 2]]),
        "cu_seqlens": np.array([0, len(first) + 3, length]),
        "targets": np.where(is_target, generator.integers(0, 96, length), -100),
    }


def numpy_row(inputs: Arrays, positions: NDArray[np.int64]) -> Row:
    """Return the inputs in the form of the NumPy model."""

    def patch_grids(name: str) -> list[tuple[int, int]]:
        return [(int(height), int(width)) for _, height, width in inputs.get(name, [])]

    none = np.empty((0, 3, PATCH, PATCH))
    return Row(
        token_ids=inputs["input_ids"],
        positions=positions,
        bounds=inputs.get("cu_seqlens", np.array([0, len(inputs["input_ids"])])).tolist(),
        image_patches=inputs.get("pixel_values", none).astype(np.float64),
        image_patch_grids=patch_grids("image_grid_thw"),
        video_patches=inputs.get("pixel_values_videos", none).astype(np.float64),
        video_patch_grids=patch_grids("video_grid_thw"),
        targets=inputs["targets"],
    )


def _patches(generator: np.random.Generator, count: int) -> NDArray[np.float32]:
    return generator.standard_normal((count, 3, PATCH, PATCH)).astype(np.float32)


def _load(folder: Path, precision: Precision) -> tuple[HfFolder, OneProcessModel]:
    opened = open_hf(folder)
    return opened, OneProcessModel(opened.model, torch.device("cpu"), precision)


def _dump(folder: Path, inputs: Arrays, precision: Precision, gradients: bool) -> Arrays:
    opened, model = _load(folder, precision)
    model.load_hf(opened)
    row = inputs_from_arrays(inputs, opened.model)
    return dump(model, row, gradients_as=opened.layout if gradients else None)


def _dump_transformers(folder: Path, inputs: Arrays, precision: Precision) -> Arrays:
    opened, model = _load(folder, precision)
    return run_qwen3_moe(opened, model, inputs_from_arrays(inputs, opened.model))


def _save_native(folder: Path, to: Path) -> Path:
    opened, model = _load(folder, "fp32")
    model.load_hf(opened)
    run, grid = model.run.with_overrides([f"output_dir={to}"]), model.grid
    seed_rank(0, grid)
    trained = build_model(run, grid, model.device, uses_transformer_engine=False)
    assert trained.vision is not None, "the only rank encodes"
    trained.stages[0].module.load_state_dict(model.stage.state_dict())
    trained.vision.module.load_state_dict(model.tower.state_dict())
    optimizer = JointOptimizer(run, trained, grid)
    return save(run, trained, optimizer, grid, Progress(step=0, updates=0, data={}))
