# SPDX-License-Identifier: Apache-2.0
"""What training made of a checkpoint is exported with all that came with it, during a run too."""

import errno
import json
import logging
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_keye.checkpoint import export, training_checkpoint
from megatron_keye.checkpoint.convert.convert import Options, hf_to_native, native_to_hf
from megatron_keye.checkpoint.convert.hf_export import begin_export
from megatron_keye.checkpoint.convert.synthetic import write_synthetic
from megatron_keye.checkpoint.convert.to_hf import HfMaker
from megatron_keye.checkpoint.hf.safetensors_index import open_folder
from megatron_keye.config import CheckpointConfig, RunConfig
from tests.support.hf_checkpoint import UNREAD_FIELDS, write_small_files
from tests.support.ranks import run_on_ranks
from tests.support.released import released
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import build_step, let_go, train

RUN = tiny_run(tensor=2, training={"precision": "bf16"})


@dataclass(frozen=True)
class Exported:
    """A released folder, and what it became after a conversion and two steps of training."""

    hf: Path
    files: dict[str, str]
    weights: dict[str, Tensor]
    out: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    write_synthetic(folder / "hf", RUN.model)
    files = write_small_files(folder / "hf")
    hf_to_native(folder / "hf", folder / "native", RUN, Options())
    started = replace(RUN, output_dir=str(folder)).with_overrides(
        [f"training.checkpoint.weights={folder / 'native'}"]
    )
    run_on_ranks(2, _load_and_save, started.to_json(), folder / "native")
    checkpoints = folder / "tiny" / "checkpoints"
    first = checkpoints / "step-00000000"
    trained = train(RUN, [mixed_rows(0), mixed_rows(1)], load_from=first, save_to=folder)
    # One checkpoint, copied alone.
    copied = (checkpoints / "step-00000002").rename(folder / "copied")
    native_to_hf(copied, folder / "out", Options(), needs_all_files=True)
    return Exported(folder / "hf", files, trained.weights, folder / "out")


def test_what_came_with_the_weights_is_exported_after_training(exported: Exported) -> None:
    for name, content in exported.files.items():
        assert (exported.out / name).read_text() == content, name
    config = json.loads((exported.out / "config.json").read_text())
    assert {name: config[name] for name in UNREAD_FIELDS} == UNREAD_FIELDS
    expected = released(exported.weights, RUN)
    got = {name: entry.read() for name, entry in open_folder(exported.out).items()}
    assert got.keys() == expected.keys()
    assert not [name for name, t in expected.items() if not torch.equal(t, got[name])]
    start = open_folder(exported.hf)["model.norm.weight"].read()
    assert not torch.equal(got["model.norm.weight"], start), "it has learned"


def test_transformers_reads_an_export(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="it is what reads an export")
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    config = transformers.AutoConfig.from_pretrained(exported.out, trust_remote_code=True)
    assert type(config).__name__ == "KeyeVL2Config" and config.hidden_size == 32
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.out, trust_remote_code=False)
    chat = [{"role": "user", "content": "What is it?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    generation = transformers.GenerationConfig.from_pretrained(exported.out)
    assert generation.eos_token_id == [89]


def _load_and_save(run_json: str, weights: Path) -> None:
    run = RunConfig.from_json(run_json)
    grid, model, optimizer, _ = build_step(run)
    training_checkpoint.load_weights(weights, run, model, optimizer, grid)
    if grid.rank == 0:
        export.take_carried_files(run, None)
    start = training_checkpoint.Progress(step=0, updates=0, data={})
    training_checkpoint.save(run, model, optimizer, grid, start)
    let_go(model)


def test_ranks_export_while_they_train_what_the_command_exports(tmp_path: Path) -> None:
    checkpoint = CheckpointConfig(export_every=1, keep_exports=2)
    run = tiny_run(data=2, training={"checkpoint": checkpoint})
    run = replace(run, output_dir=str(tmp_path))
    folder, exports = tmp_path / "tiny", tmp_path / "tiny" / "exports"
    (exports / "step-00000009.partial").mkdir(parents=True)
    (folder / "hf").mkdir()
    (folder / "hf" / "LICENSE").write_text("Apache-2.0")
    failed = run_on_ranks(2, _save_and_export, run.to_json())[0]
    assert {path.name for path in exports.iterdir()} == {"step-00000002", "step-00000003"}
    checkpoints = folder / "checkpoints"
    native_to_hf(checkpoints / "step-00000003", tmp_path / "hf", Options(), file_bytes=60_000)
    by_command = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    by_ranks = {path.name: path.read_bytes() for path in (exports / "step-00000003").iterdir()}
    assert by_command == by_ranks and "LICENSE" in by_ranks
    assert len([name for name in by_ranks if name.endswith(".safetensors")]) > 3
    assert "step-00000004 was not exported" in failed and "No space left" in failed
    assert "the run goes on" in failed


def _save_and_export(run_json: str) -> str:
    """Save four checkpoints and export them; the last time the disk of rank 1 is full."""
    run = RunConfig.from_json(run_json)
    grid, model, optimizer, _ = build_step(run)
    log = StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("megatron_keye.checkpoint.export").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "begin_export", partial(begin_export, file_bytes=60_000))
        for step in range(1, 5):
            progress = training_checkpoint.Progress(step=step, updates=0, data={})
            folder = training_checkpoint.save(run, model, optimizer, grid, progress)
            if step == 4 and grid.rank == 1:
                patch.setattr(HfMaker, "fill", _fail)
            export.export_checkpoint(run, folder)
    logging.getLogger("megatron_keye.checkpoint.export").removeHandler(handler)
    let_go(model)
    return log.getvalue()


def _fail(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
