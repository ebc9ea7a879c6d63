# SPDX-License-Identifier: Apache-2.0
"""The program imports only what a command needs, and finds its commands and their help."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_keye
from megatron_keye.cli.main import COMMANDS, main

PROBE = """
import sys
from megatron_keye.cli.main import main
try:
    sys.exit(main(sys.argv[1:]))
finally:
    heavy = sorted({"torch", "megatron", "transformers", "triton"} & set(sys.modules))
    assert not heavy, heavy
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that fails if it imports torch."""
    command = [sys.executable, "-c", PROBE, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_keeps_the_examples_and_needs_no_torch(command: str) -> None:
    answer = run(command, "--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith(f"usage: megatron-keye {command} ")
    text = importlib.import_module(f"megatron_keye.cli.{command}").__doc__
    examples = [line for line in text.splitlines() if line.startswith("    ")]
    assert any(f"megatron-keye {command}" in line for line in examples)
    assert set(examples) <= set(answer.stdout.splitlines())


@pytest.mark.parametrize(
    "words", [["--help"], ["plan", "keye_tiny"], ["settings"], ["train", "keye_tiny", "--show"]]
)
def test_what_needs_no_model_needs_no_torch(words: list[str]) -> None:
    answer = run(*words, *(["--ranks", "2"] if len(words) > 1 else []))
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_argument_is_reported_alone(command: str) -> None:
    answer = run(command, "--nonsense")
    assert (answer.returncode, answer.stdout) == (2, "")
    pattern = rf"usage: megatron-keye {command} [^!]*\nmegatron-keye {command}: error: .*\n"
    assert re.fullmatch(pattern, answer.stderr), answer.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["train", "keye_tini", "--show"],
        ["plan", "keye_tini"],
        ["simulate", "keye_tini"],
        ["evaluate", "keye_tini", "--task", "count", "--samples", "a", "--answers", "b"],
        ["prepare", "a.jsonl", "--out", "b", "--recipe", "keye_tini"],
    ],
    ids=lambda words: words[0],
)
def test_a_wrong_recipe_is_one_sentence_and_needs_no_torch(words: list[str]) -> None:
    answer = run(*words)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert re.fullmatch(r"error: recipe: got 'keye_tini', .*\n", answer.stderr), answer.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["profile", "keye_tini", "--fit-vision"],
        ["convert", "hf-to-native", "--hf", "a", "--out", "b", "--recipe", "keye_tini"],
        ["verify", "--hf", "nowhere"],
        ["generate", "keye_tini", "--weights", "a"],
    ],
    ids=lambda words: words[0],
)
def test_libraries_add_nothing_to_an_error(words: list[str], tmp_path: Path) -> None:
    # With a toolkit and without a GPU torch warns, and Megatron does without optional packages.
    answer = subprocess.run(
        [sys.executable, "-m", "megatron_keye", *words],
        # As a rank, which some commands start; the others ignore it.
        env=os.environ | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stdout) == (2, "")
    assert re.fullmatch(r"error: .*\n", answer.stderr), answer.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command, meaning in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [command, meaning] for line in text.splitlines())


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"megatron-keye {megatron_keye.__version__}\n"


def test_an_unknown_command_is_refused_with_a_similar_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pln", "keye_tiny"])
    assert ended.value.code == 2
    assert "got command 'pln'; did you mean plan?" in capsys.readouterr().err


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_the_package_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "megatron_keye", "settings", "data.row_tokens"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "data.row_tokens  (integer; no default)" in answer.stdout
