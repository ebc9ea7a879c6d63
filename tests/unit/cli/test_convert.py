# SPDX-License-Identifier: Apache-2.0
"""The command converts both ways and reports a wrong checkpoint in one sentence."""

from pathlib import Path

import pytest
import torch

from megatron_keye.checkpoint.convert.synthetic import write_synthetic
from megatron_keye.checkpoint.hf.safetensors_index import open_folder
from megatron_keye.cli import convert
from megatron_keye.recipes import load_recipe

RECIPE = ["--recipe", "keye_tiny", "--set", "model.decoder.vocab_size=151665"]
LAYERS = ["--set", "model.decoder.num_layers=1", "--workers", "1"]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    run = load_recipe("keye_tiny")(num_ranks=1, has_gpu=True)
    run = run.with_overrides([RECIPE[-1], LAYERS[1]])
    write_synthetic(tmp_path / "hf", run.model)
    return tmp_path / "hf"


def test_both_directions_by_command_line(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    arguments = ["hf-to-native", "--hf", str(hf), "--out", str(native), *RECIPE, *LAYERS]
    assert convert.main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(native)]
    arguments = ["native-to-hf", "--native", str(native), "--out", str(back), "--workers", "1"]
    assert convert.main([*arguments, "--require-complete"]) == 2
    assert "tokenizer.json (text can't be read)" in capsys.readouterr().err
    assert convert.main([*arguments, "--check-finite"]) == 0
    assert capsys.readouterr().out.split() == [str(back)]
    got, expected = open_folder(back), open_folder(hf)
    assert not [n for n, e in expected.items() if not torch.equal(e.read(), got[n].read())]


def test_a_wrong_checkpoint_is_one_sentence(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["hf-to-native", "--hf", str(hf), "--out", str(tmp_path / "n"), *RECIPE]
    assert convert.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "--set model.decoder.num_layers=1" in error
    assert not (tmp_path / "n.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--adapter: got"),
        (("--files-from", "."), "--files-from: got a folder, expected none with --adapter"),
    ],
)
def test_a_checkpoint_without_adapters_has_none_to_export(
    options: tuple[str, ...],
    message: str,
    hf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    native, out = str(tmp_path / "native"), tmp_path / "adapter"
    convert.main(["hf-to-native", "--hf", str(hf), "--out", native, *RECIPE, *LAYERS])
    capsys.readouterr()
    arguments = ["native-to-hf", "--native", native, "--out", str(out), "--adapter", *options]
    assert convert.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not list(tmp_path.glob("adapter*"))
