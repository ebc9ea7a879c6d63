# SPDX-License-Identifier: Apache-2.0
"""The history of weights goes through conversion, there and back."""

import json
from pathlib import Path

import torch

from megatron_keye.checkpoint.convert.convert import Options, hf_to_native, native_to_hf
from megatron_keye.checkpoint.convert.synthetic import write_noise
from megatron_keye.checkpoint.convert.warm_start import warm_start
from megatron_keye.checkpoint.hf.parameter_shapes import parameter_shapes, part_of
from megatron_keye.checkpoint.hf.write_config import make_config
from megatron_keye.checkpoint.history import HISTORY, read_history, released
from megatron_keye.checkpoint.manifest import write_manifest
from tests.support.tiny import tiny_run

RUN = tiny_run()
SHAPES = parameter_shapes(RUN.model, "per-expert")


def write_released(
    folder: Path, shapes: dict[str, tuple[int, ...]], model_type: str = "KeyeVL2"
) -> None:
    write_noise(folder, shapes, dtype=torch.bfloat16, file_bytes=1_000_000)
    config = make_config(RUN.model, "bfloat16", {}) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_released_checkpoint_counts_as_sparse_until_it_brings_a_history(tmp_path: Path) -> None:
    write_released(tmp_path / "Keye", SHAPES)
    hf_to_native(tmp_path / "Keye", tmp_path / "native", RUN, Options())
    assert read_history(tmp_path / "native") == [released("Keye")]
    native_to_hf(tmp_path / "native", tmp_path / "export", Options())
    hf_to_native(tmp_path / "export", tmp_path / "again", RUN, Options())
    assert read_history(tmp_path / "again") == [released("Keye")]
    (tmp_path / "native" / HISTORY).unlink()
    write_manifest(tmp_path / "native", {})
    native_to_hf(tmp_path / "native", tmp_path / "bare", Options())
    assert read_history(tmp_path / "bare") is None


def test_a_warm_start_is_dense_and_names_the_parts_that_have_learned(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if part_of(name) == "decoder"}
    write_released(tmp_path / "Qwen3", shapes, "qwen3_moe")
    warm_start(tmp_path / "Qwen3", None, tmp_path / "native", RUN, Options())
    assert read_history(tmp_path / "native") == [
        {"run": "Qwen3", "phase": "dense", "steps": 0, "trained": ["decoder"]}
    ]
