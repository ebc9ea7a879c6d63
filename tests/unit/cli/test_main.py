"""The program imports only what a command needs, and finds its commands and their help."""

import importlib
import subprocess
import sys

import pytest

import megatron_keye
from megatron_keye.cli.main import COMMANDS, main

PROBE = """
import sys
from megatron_keye.cli.main import main
try:
    main(sys.argv[1:])
finally:
    heavy = sorted({"torch", "megatron", "transformers", "triton"} & set(sys.modules))
    assert not heavy, heavy
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_keeps_the_examples_and_needs_no_torch(command: str) -> None:
    words = [sys.executable, "-c", PROBE, command, "--help"]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
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
    answer = subprocess.run(
        [sys.executable, "-c", PROBE, *words, *(["--ranks", "2"] if len(words) > 1 else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stderr) == (0, "")


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
