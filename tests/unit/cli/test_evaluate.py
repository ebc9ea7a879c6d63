# SPDX-License-Identifier: Apache-2.0
"""Answers from a file, or of a model that generates first, are scored, shown and written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.cli import evaluate, main
from megatron_keye.scoring.question import user_turn

TRUTHS: list[dict[str, Any]] = [
    {"intervals": [[0, 10]], "seconds": 10},
    {"intervals": [[2, 4]], "seconds": 90},
    {"intervals": [], "seconds": 90},
]
COUNT = {"messages": list(user_turn("a.mp4", "?")), "task": "count", "truth": {"number": 2}}
TEXTS = ("from 0 to 10 s", "2 - 3 s", "It never happens.")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Return a file with a count between questions of grounding."""
    grounding = [
        {"messages": list(user_turn("a.mp4", "When?")), "task": "grounding", "truth": truth}
        for truth in TRUTHS
    ]
    return put(tmp_path / "q.jsonl", grounding[0], COUNT, *grounding[1:])


def put(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def words(samples: Path, *more: str) -> list[str]:
    return ["keye_tiny", "--samples", str(samples), "--task", "grounding", *more]


def test_answers_from_a_file_are_scored_shown_and_written(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"name": f"{samples}:{line}", "answer": 0, "text": text, "finish": "stop"}
        for line, text in zip((1, 3, 4), TEXTS, strict=True)
    ]
    count = {"name": "q.jsonl:2", "answer": 0, "text": "2"}
    answers = put(tmp_path / "a.jsonl", *lines[:2], count)
    out = tmp_path / "scores"
    assert evaluate.main(words(samples, "--answers", str(answers), "--out", str(out))) == 0
    shown = capsys.readouterr().out
    assert "0 to 15 s" in shown and "60 to 180 s" in shown and "1.000" in shown
    every, short, long = json.loads((out / "scores.json").read_text())
    assert every["metrics"] == {"mIoU": 0.5, "R1@0.3": 2 / 3, "R1@0.5": 2 / 3, "R1@0.7": 1 / 3}
    assert (every["num_questions"], every["num_unanswered"]) == (3, 1)
    assert (short["metrics"]["mIoU"], long["metrics"]["mIoU"]) == (1, 0.25)
    scored = [json.loads(line) for line in (out / "answers.scored.jsonl").open()]
    assert [line["understood"] for line in scored] == [[[0, 10]], [[2, 3]]]
    assert (out / "scores.svg").read_text().startswith("<svg")
    assert evaluate.main(words(samples, "--answers", str(answers), "--json")) == 0
    assert json.loads(capsys.readouterr().out)[0] == every


def test_a_model_answers_the_questions_of_the_task_alone(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def generate(arguments: Sequence[str] | None = None) -> int:
        assert arguments is not None
        given = dict(zip(arguments, arguments[1:], strict=False))
        lines = Path(given["--samples"]).read_text().splitlines()
        asked = [json.loads(line) for line in lines]
        called.append(list(arguments))
        assert [line["messages"][0]["content"][0]["video"] for line in asked] == ["../a.mp4"] * 3
        answers = [
            {"name": f"{given['--samples']}:{number}", "answer": 0, "text": text}
            for number, text in enumerate(TEXTS, start=1)
        ]
        put(Path(given["--out"]), *answers)
        return 0

    monkeypatch.setattr(main, "main", generate)
    out = tmp_path / "scores"
    more = ("--weights", "W", "--out", str(out), "--set", "rollout.temperature=1", "--ranks", "2")
    assert evaluate.main(words(samples, *more)) == 0
    assert json.loads((out / "scores.json").read_text())[0]["metrics"]["mIoU"] == 2.5 / 3
    [arguments] = called
    assert arguments[:4] == ["generate", "keye_tiny", "--weights", "W"]
    # Of two settings of a name the later one holds.
    settings = ["--set", "rollout.temperature=0", "--set", "rollout.temperature=1"]
    assert arguments[-6:] == ["--ranks", "2", *settings]


def test_a_failed_generation_ends_with_its_status(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "main", lambda arguments: 3)
    more = ("--weights", "W", "--out", str(tmp_path / "scores"))
    assert evaluate.main(words(samples, *more)) == 3
    assert not (tmp_path / "scores" / "scores.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--answers", "{samples}"), "expected 'text' and 'name' or 'id'"),
        (("--answers", "gone.jsonl"), "gone.jsonl: cannot be read"),
        (("--answers", "a", "--task", "choice"), "got 'choice', expected a task of"),
        (("--answers", "a", "--samples", "gone.jsonl"), "gone.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(
    more: tuple[str, ...], message: str, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.replace("{samples}", str(samples)) for word in more]
    assert evaluate.main(words(samples, *filled)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "more", [(), ("--weights", "W"), ("--answers", "a", "--lengths", "9", "3")]
)
def test_wrong_arguments_are_refused(more: tuple[str, ...], samples: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main(words(samples, *more))
    assert ended.value.code == 2
