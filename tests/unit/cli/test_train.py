# SPDX-License-Identifier: Apache-2.0
"""The command `train` before it starts ranks, and the command line of a rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_keye.cli import local, rank, train
from megatron_keye.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "RANKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Return what would have been launched: words behind the interpreter, number of ranks."""
    calls = []

    def launch(command: list[str], num_ranks: int) -> int:
        calls.append((command[1:], num_ranks))
        return 0

    monkeypatch.setattr(local, "launch", launch)
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    return calls


def test_ranks_are_this_command_with_the_same_arguments(
    launched: list[tuple[list[str], int]],
) -> None:
    words = ["keye_tiny", "--ranks", "3", "--set", "training.steps=2", "--resume", "auto"]
    assert train.main(words) == 0
    assert launched == [(["-m", "megatron_keye", "train", *words], 3)]


def test_check_says_whether_the_settings_fit_the_ranks(
    launched: list[tuple[list[str], int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["keye_tiny", "--ranks", "3", "--check"]) == 0
    assert train.main(["keye_30b_a3b", "--ranks", "96", "--check"]) == 2
    assert "expected 96, the number of ranks that were started" in capsys.readouterr().err
    assert not launched


@pytest.mark.parametrize(
    ("variable", "gpus", "expected"), [("", 0, 4), ("", 2, 2), ("6", 2, 6)], ids=str
)
def test_ranks_default_to_the_variable_the_gpus_or_four(
    variable: str,
    gpus: int,
    expected: int,
    launched: list[tuple[list[str], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANKS", variable)
    monkeypatch.setattr(local, "count_gpus", lambda: gpus)
    assert train.main(["keye_tiny"]) == 0
    assert [num_ranks for _, num_ranks in launched] == [expected]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_ranks_is_refused(
    text: str,
    launched: list[tuple[list[str], int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        train.main(["keye_tiny", f"--ranks={text}"])
    assert f"argument --ranks: got '{text}', expected 1 or more" in capsys.readouterr().err
    monkeypatch.setenv("RANKS", text)
    assert train.main(["keye_tiny"]) == 2
    assert capsys.readouterr().err == f"error: variable RANKS: got '{text}', expected 1 or more\n"
    assert not launched


def test_show_prints_the_run_for_the_ranks_that_would_start(
    launched: list[tuple[list[str], int]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "keye_tiny",
        "--ranks",
        "2",
        "--show",
        "--resume",
        "auto",
        "--set",
        "training.steps=3",
    ]
    assert train.main(words) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["parallel"]["vision"]["num_ranks"] == 1
    assert run["training"]["steps"] == 3 and run["training"]["precision"] == "fp32"
    assert run["training"]["checkpoint"]["resume"] == "auto"
    assert not launched


def test_gpus_are_not_looked_for_with_torch_where_there_is_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local.Path, "glob", lambda self, pattern: [])
    monkeypatch.setattr(local.Path, "exists", lambda self: False)
    monkeypatch.setattr(local.subprocess, "run", lambda *a, **k: pytest.fail("asked torch"))
    assert local.count_gpus() == 0


def test_gpus_are_counted_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.Path, "glob", lambda self, pattern: [Path("/dev/nvidia0")])
    answer = subprocess.CompletedProcess([], 0, stdout="3\n")
    monkeypatch.setattr(local.subprocess, "run", lambda *a, **k: answer)
    assert local.count_gpus() == 3
    answer.returncode = 1
    with pytest.raises(UserError, match="megatron-keye doctor"):
        local.count_gpus()


def test_the_script_reports_a_wrong_flag_once() -> None:
    words = [
        "bash",
        str(ROOT / "launch" / "local.sh"),
        "--ranks",
        "4",
        "keye_tiny",
        "--sett",
        "a=1",
    ]
    environment = os.environ | {"PYTHON": sys.executable, "RANK": "0"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("unrecognized arguments: --sett a=1") == 1


def test_the_script_shows_its_help_once() -> None:
    words = ["bash", str(ROOT / "launch" / "local.sh"), "--help"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("--ranks N") == 2, "in the usage and in the list"
    assert not done.stderr


def test_a_rank_refuses_another_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = train.parse_arguments(["keye_tiny", "--ranks", "4"])
    with pytest.raises(UserError, match="--ranks: got 4, expected 2, the number of ranks that"):
        rank.make_run(options, 2)
    assert rank.make_run(options, 4).parallel.num_ranks == 4


def test_only_rank_0_reports_a_wrong_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank, "complete_environment", lambda *a, **k: None)
    monkeypatch.setattr(rank, "quieten", lambda number: None)
    monkeypatch.setattr(rank.signal, "signal", lambda *a: None)
    monkeypatch.setattr(rank, "SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, reports in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", number)
        assert train.main(["keye_tini"]) == 2
        assert capsys.readouterr().err.count("error: recipe: got 'keye_tini'") == reports
