# SPDX-License-Identifier: Apache-2.0
"""What a user may give instead of a checkpoint of ours is named, with what to do about it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_keye.checkpoint.hf.folder import open_hf, open_unquantised
from megatron_keye.checkpoint.hf.safetensors_index import INDEX
from megatron_keye.errors import UserError
from tests.support.hf_checkpoint import CONFIG, random_weights, write_checkpoint

SMALL = {name: np.zeros((2, 2), np.float32) for name in ("model.norm.weight", "lm_head.weight")}
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "hf", CONFIG, SMALL)


def with_config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: write(folder / "config.json", json.dumps(CONFIG | fields))


def with_tensor(name: str, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        (folder / INDEX).unlink()
        held = load_file(folder / FIRST) | {name: torch.zeros(2, 2).to(dtype)}
        save_file(held, folder / FIRST)

    return add


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def only(*names: str) -> Callable[[Path], None]:
    """Leave nothing but these files, of no content."""

    def replace(folder: Path) -> None:
        for path in list(folder.iterdir()):
            path.unlink()
        for name in names:
            write(folder / name)

    return replace


def linked_to_nothing(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(folder / "blobs" / "gone")


def without_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / SECOND).unlink()


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "FP8 by config": (
        with_config(quantization_config={"quant_method": "fp8"}),
        "quantization_config with quant_method = 'fp8' .*take the original",
    ),
    "GPTQ by config": (with_config(quantization_config={"quant_method": "gptq"}), "'gptq'"),
    "FP8 by type": (
        with_tensor("model.layers.0.x.weight", torch.float8_e4m3fn),
        "tensor model.layers.0.x.weight of type F8_E4M3, as FP8 .*take the original",
    ),
    "FP8 by scale": (with_tensor("model.layers.0.x.weight_scale_inv"), "as FP8 checkpoints"),
    "GPTQ by name": (with_tensor("model.layers.0.x.qweight", torch.int32), "as GPTQ or AWQ"),
    "bitsandbytes": (with_tensor("model.layers.0.x.weight.absmax"), "as bitsandbytes"),
    "unknown type": (with_tensor("x", torch.complex64), "unknown type C64"),
    "LoRA adapter": (
        lambda folder: write(folder / "adapter_config.json", "{}"),
        "a LoRA adapter, merge it",
    ),
    "LoRA names": (with_tensor("base_model.model.model.x.lora_A.weight"), "a LoRA adapter's"),
    "LoRA alone": (only("adapter_config.json", "adapter_model.bin"), "got a LoRA adapter"),
    "Qwen3-VL names": (with_tensor("model.language_model.norm.weight"), "Qwen3-VL's; take"),
    "dense names": (with_tensor("model.layers.0.mlp.gate_proj.weight"), "of a dense decoder"),
    "wrapped": (with_tensor("module.model.norm.weight"), "training framework's wrapper"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "got no config.json"),
    "pickles": (only("config.json", "pytorch_model-1.bin"), "got pytorch_model-1.bin and no saf"),
    "GGUF": (only("keye.gguf"), "got GGUF files.*quantised"),
    "native": (only("metadata.json", ".metadata"), "a native checkpoint.*native-to-hf"),
    "hub cache": (only("snapshots/abc"), "cache of the Hugging Face hub.*give .*snapshots/abc"),
    "unfinished": (only("a.safetensors.part"), "unfinished download a.safetensors.part"),
    "unfinished by the hub": (
        only("config.json", ".cache/huggingface/download/x.incomplete"),
        "unfinished download x.incomplete",
    ),
    "empty": (only(), "got no \\*.safetensors file"),
    "LFS pointer": (
        lambda folder: write(folder / FIRST, "version https://git-lfs.github.com/spec/v1\noid x"),
        f"{FIRST}: got the pointer of git LFS.*git lfs pull",
    ),
    "missing file": (
        lambda folder: (folder / SECOND).unlink(),
        f"got 1 of the 2 files that its index names, expected all; download {SECOND}",
    ),
    "missing file, no index": (without_index, f"its numbering tells of.*download {SECOND}"),
    "link to nothing": (linked_to_nothing, f"expected all; download {FIRST}"),
    "half a file": (
        lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-9]),
        f"{FIRST}: got .*cut short, copy it again",
    ),
    "empty file": (
        lambda folder: (folder / FIRST).write_bytes(b""),
        f"{FIRST}: got 0 bytes.*cut short, copy it again",
    ),
}


@pytest.mark.parametrize(("change", "message"), KINDS.values(), ids=KINDS)
def test_a_checkpoint_of_another_kind_is_named(
    change: Callable[[Path], object], message: str, folder: Path
) -> None:
    change(folder)
    for opened in (open_unquantised, open_hf):
        with pytest.raises(UserError, match=message) as error:
            opened(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_file_or_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    write(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="got a GGUF file"):
        open_unquantised(tmp_path / "model.gguf")
    with pytest.raises(UserError, match="got a file.*give the folder that holds it"):
        open_unquantised(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="got no such folder"):
        open_unquantised(tmp_path / "absent")


def test_a_whole_checkpoint_is_opened(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    folder = write_checkpoint(tmp_path / "hf", CONFIG, weights)
    assert open_unquantised(folder).keys() == open_hf(folder).entries.keys() == weights.keys()
