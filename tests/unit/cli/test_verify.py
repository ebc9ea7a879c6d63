# SPDX-License-Identifier: Apache-2.0
"""The command verify, once as a process, else by its functions."""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_keye.checkpoint.hf.folder import open_hf
from megatron_keye.cli import verification
from megatron_keye.cli.status import USER_ERROR
from megatron_keye.cli.verify import main, parse_arguments
from tests.support.dumping import mixed_inputs, save_native
from tests.support.hf_checkpoint import CONFIG, random_weights, write_checkpoint
from tests.support.ranks import run_on_ranks

COMMAND = (sys.executable, "-m", "megatron_keye", "verify")
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hf"), CONFIG, WEIGHTS)


def verify(*words: object) -> tuple[bool, str]:
    """Verify in a group of one process; return the verdict and the printed text."""
    found: tuple[bool, str] = run_on_ranks(1, _verify, [*map(str, words), "--device", "cpu"])[0]
    return found


def _verify(words: list[str]) -> tuple[bool, str]:
    arguments = parse_arguments(words)
    folder = open_hf(arguments.hf)
    inputs = verification.choose_inputs(arguments, folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        passes = verification.verify(arguments, folder, inputs, torch.device("cpu"))
    return passes, printed.getvalue()


@pytest.mark.slow
def test_inputs_are_read_and_a_dump_is_written(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **mixed_inputs())
    words = ("--inputs", tmp_path / "in.npz", "--dump", tmp_path / "out.npz", "--gradients")
    command = [*COMMAND, "--hf", folder, *words, "--dtype", "float64"]
    command += ["--device", "cpu"]
    done = subprocess.run(map(str, command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as dumped:
        assert dumped["logits"].dtype == np.float64
        gradients = [name for name in dumped.files if name.startswith("grad.")]
    assert len(gradients) == 3 * len(WEIGHTS), "of every tensor"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "out.npz"]


def test_a_native_checkpoint_equals_its_source(folder: Path, tmp_path: Path) -> None:
    native = save_native(folder, tmp_path / "runs")
    passes, printed = verify("--hf", folder, "--native", native, "--layers")
    assert passes and "hidden[1]: largest deviation 0.000e+00" in printed, printed


def test_a_changed_layer_is_found(folder: Path, tmp_path: Path) -> None:
    native = save_native(folder, tmp_path / "runs")
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    for path in changed.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.1.mlp.gate.weight" in tensors:
            tensors["model.layers.1.mlp.gate.weight"][0] -= 0.3
        save_file(tensors, path, {"format": "pt"})
    passes, printed = verify("--hf", changed, "--native", native, "--layers")
    assert not passes and "ABOVE" in printed, printed
    assert "hidden[0]: largest deviation 0.000e+00" in printed, "the layer before is the same"


def test_a_native_checkpoint_of_other_sizes_is_refused(folder: Path, tmp_path: Path) -> None:
    native = save_native(folder, tmp_path / "runs")
    wide = CONFIG | {"moe_intermediate_size": 16}
    other = write_checkpoint(tmp_path / "other", wide, random_weights(wide))
    with pytest.raises(AssertionError, match=r"linear_fc1.weight: got shape \[2, 5, 24, 40\]"):
        verify("--hf", other, "--native", native)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_transformers_agrees_on_short_text(folder: Path, dtype: str) -> None:
    pytest.importorskip("transformers", reason="the reference is transformers")
    passes, printed = verify("--hf", folder, "--against", "qwen3-moe", "--dtype", dtype)
    assert passes and "within 1e-" in printed, printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "--against qwen3-moe: got 38 tokens in 2 documents with 3 pictures"),
        ({"head_dim": None}, "config.json: got no field head_dim, expected one"),
        ({"vision_config": {}}, "config.json: got no field vision_config.hidden_size"),
        ({"norm_topk_prob": False}, "config.json: got norm_topk_prob = False, expected True"),
        ({"vocab_size": 99}, r"tensor model.embed_tokens.weight: got shape [96, 40]"),
        ({"num_hidden_layers": 3}, "got none in"),
        ({"rope_scaling": {"mrope_section": [2, 2, 4], "mrope_interleaved": True}}, "interleaved"),
    ],
    ids=str,
)
def test_a_wrong_folder_or_input_is_named(
    change: dict[str, object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {name: value for name, value in (CONFIG | change).items() if value is not None}
    np.savez(tmp_path / "in.npz", **mixed_inputs())
    broken = write_checkpoint(tmp_path / "hf", config, WEIGHTS)
    words = ["--hf", str(broken), "--against", "qwen3-moe", "--device", "cpu"]
    assert main([*words, "--inputs", str(tmp_path / "in.npz")]) == USER_ERROR
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1, printed
