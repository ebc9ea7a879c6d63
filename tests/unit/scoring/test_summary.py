# SPDX-License-Identifier: Apache-2.0
"""Means count every question, answered and understood or not, and split by length."""

import json
from pathlib import Path

import pytest

from megatron_keye.errors import UserError
from megatron_keye.scoring.answers import read_answers
from megatron_keye.scoring.question import Question, read_question, user_turn
from megatron_keye.scoring.summary import score_questions, summarize
from megatron_keye.scoring.truth import ChoiceTruth, CountTruth, GroundingTruth, Truth


def question(
    number: int, truth: Truth, seconds: float | None = None, length: str = ""
) -> Question:
    task = {GroundingTruth: "grounding", CountTruth: "count", ChoiceTruth: "choice"}[type(truth)]
    return Question(
        id=f"q{number}",
        line=number,
        task=task,  # type: ignore[arg-type]
        messages=user_turn("a.mp4", "When?"),
        truth=truth,
        seconds=seconds,
        length=length,
    )


def answers_file(folder: Path, *lines: object) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_question_counts(tmp_path: Path) -> None:
    truth = GroundingTruth(intervals=((0.0, 10.0),))
    questions = [question(1, truth, 10), question(2, truth, 12), question(3, truth, 500)]
    questions += [question(4, truth, 700), question(5, truth, None, "long")]
    file = answers_file(
        tmp_path,
        {"name": "runs/q.jsonl:1", "answer": 0, "text": "0 s to 10 s", "finish": "stop"},
        {"name": "q.jsonl:2", "answer": 0, "text": "0 s to 4 s"},
        {"id": "q2", "answer": 1, "text": "4 s to 10 s", "finish": "length"},
        {"id": "q3", "text": "no idea"},
        {"id": "q5", "text": "[[0, 5]]"},
    )
    answers = read_answers(file, Path("q.jsonl"), questions)
    every, short, *others = summarize(score_questions(questions, answers))
    assert (every.num_questions, every.num_answers) == (5, 5)
    assert (every.num_unanswered, every.num_not_understood, every.num_cut) == (1, 1, 1)
    assert every.metrics == pytest.approx(
        {"mIoU": 2.0 / 5, "R1@0.3": 3 / 5, "R1@0.5": 2.5 / 5, "R1@0.7": 1 / 5}
    )
    assert every.blind is None, "the length of one video is not known"
    assert short.blind == pytest.approx((10 / 10 + 10 / 12) / 2)
    assert (short.length, short.num_questions) == ("0 to 15 s", 2)
    assert short.metrics["mIoU"] == pytest.approx((1 + (0.4 + 0.6) / 2) / 2)
    assert [summary.length for summary in others] == ["180 to 600 s", "600 to 1800 s", "long"]
    assert sum(summary.num_questions for summary in (short, *others)) == every.num_questions


def test_lengths_belong_to_one_class() -> None:
    truth = CountTruth(number=1)
    at_bounds = [question(n, truth, s) for n, s in enumerate([4.9, 5, 9.9, 10, 1e6])]
    _, *classes = summarize(score_questions(at_bounds, {}), bounds=(5, 10))
    assert [(c.length, c.num_questions) for c in classes] == [
        *(("0 to 5 s", 1), ("5 to 10 s", 2), ("10 s and more", 2)),
    ]
    assert all(c.num_unanswered == c.num_questions and not c.metrics["accuracy"] for c in classes)


@pytest.mark.parametrize(
    "truth",
    [
        {"intervals": [[1.5, 2.0]], "seconds": 9.0},
        {"letter": "B", "options": ["x", "y"], "length": "short"},
        {"number": 3},
        {"text": "A red ball."},
    ],
    ids=["grounding", "choice", "count", "caption"],
)
def test_a_question_is_read_as_it_is_written(
    truth: dict[str, object], request: pytest.FixtureRequest
) -> None:
    task = request.node.callspec.id
    turns = [*user_turn("a.mp4", "When?"), {"role": "assistant", "content": "Now."}]
    record = {"messages": turns, "task": task, "truth": truth}
    read = read_question(record, "a.jsonl:7", 7)
    assert (read.id, read.task, read.messages) == ("7", task, user_turn("a.mp4", "When?"))
    assert read_question(read.written(), "b", 7) == read
    assert read.written()["truth"] == truth


@pytest.mark.parametrize(
    ("task", "truth", "message"),
    [
        ("cubes", {}, "'task': got 'cubes', expected one of grounding, choice, count, caption"),
        ("count", {"numbr": 3}, r"got keys \['numbr'\], expected \['number'\]"),
        ("count", {"number": 2.5}, "expected a whole number"),
        ("count", [3], r"'truth': got \[3\], expected an object"),
        ("grounding", {"intervals": [[2, 1]]}, r"got \[2, 1\], expected \[start, end\]"),
        ("grounding", {"intervals": [[0, 1]], "seconds": 0}, "expected seconds above 0"),
        ("choice", {"letter": "C", "options": ["x", "y"]}, "got 'C', expected one of AB"),
        ("caption", {"text": " "}, "expected words"),
    ],
)
def test_a_malformed_question_is_refused_by_line(task: str, truth: object, message: str) -> None:
    record = {"messages": list(user_turn("a.mp4", "?")), "task": task, "truth": truth}
    with pytest.raises(UserError, match=f"^a.jsonl:7: .*{message}"):
        read_question(record, "a.jsonl:7", 7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": 1, "answer": "x"}, r"got keys \['answer', 'id'\], expected 'text' and 'name' or"),
        ({"id": 1.5, "text": "x"}, "'id': got 1.5, expected text or a whole number"),
        ({"id": "q9", "text": "x"}, "'id': got 'q9', expected a question of q.jsonl"),
        ({"name": "other.jsonl:1", "text": "x"}, "'name': got 'other.jsonl:1', expected a quest"),
        ({"name": "q.jsonl:9", "text": "x"}, "'name': got 'q.jsonl:9', expected a question"),
        ({"id": "q1", "answer": "x", "text": "x"}, "'answer': got 'x', expected its number"),
        ({"id": "q1", "text": "x"}, "is answer 0 to question 'q1' once more"),
        ("x", "got str, expected an object"),
    ],
)
def test_an_answer_that_is_malformed_or_to_no_question_is_refused(
    line: object, message: str, tmp_path: Path
) -> None:
    file = answers_file(tmp_path, {"name": "q.jsonl:1", "text": "x"}, line)
    with pytest.raises(UserError, match=f"answers.jsonl:2: .*{message}"):
        read_answers(file, Path("q.jsonl"), [question(1, CountTruth(number=1))])
