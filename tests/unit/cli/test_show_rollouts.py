# SPDX-License-Identifier: Apache-2.0
"""The best and the worst answers are shown by kind of question."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.cli.show_rollouts import main


def record(task: str, answer: int, total: float | None, text: str) -> dict[str, Any]:
    reward = None if total is None else {"total": total, "task": total, "format": 1.0}
    return {
        "step": 3,
        "question": "q.jsonl, question '7'",
        "answer": answer,
        "task": task,
        "text": text,
        "finish": "stop",
        "num_tokens": 5,
        "reward": reward,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rollouts = tmp_path / "rollouts"
    rollouts.mkdir()
    lines = [
        record("count", 0, 0.2, "two\nor three"),
        record("count", 1, 0.9, "three"),
        record("count", 2, 0.0, "x" * 1_000),
        record("count", 3, None, "hang"),
        record("grounding", 0, 0.5, "[[1, 2]]"),
    ]
    (rollouts / "step-00000003.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (rollouts / "step-00000002.jsonl").write_text("")
    return tmp_path


def test_the_newest_step_is_shown_ranked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--count", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("count: 4 answers, mean reward 0.367, 1 not scored\n  best\n    0.900")
    best, worst = shown.index("three"), shown.index("  worst\n    0.000")
    assert best < worst < shown.index("grounding: 1 answers")
    assert "two" not in shown and "hang" not in shown and len(shown) < 1_000
    assert main([str(folder), "--count", "2", "--task", "count"]) == 0
    shown = capsys.readouterr().out
    assert "two\\nor three" in shown and "grounding" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "9"], "--step: got 9, expected one from 2 to 3"),
        (["--task", "boxes"], "--task: got 'boxes', expected one of count, grounding"),
    ],
)
def test_what_is_not_there_is_refused(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_rollouts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "expected the folder of a run with post_training.kind" in capsys.readouterr().err
