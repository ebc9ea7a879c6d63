# SPDX-License-Identifier: Apache-2.0
"""Answers of a model, from the JSON lines that `megatron-keye generate` writes.

A line has the "name" of its question, FILE:LINE, the number of the "answer" if there are several,
its "text", and how it ended ("finish", "length" where it was cut). Other programs may write "id",
the question's own, in place of the name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_keye.data.conversation.values import shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.question import Question, read_id
from megatron_keye.scoring.record_file import read_records


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One text of a model."""

    number: int
    """Which of several answers to one question, from 0."""
    text: str
    """What the model wrote."""
    is_cut: bool = False
    """Whether it ends at a limit of tokens and not by itself."""


def read_answers(
    path: Path, samples: Path, questions: Sequence[Question]
) -> dict[str, list[Answer]]:
    """Return the answers of a file by the ids of their questions.

    Args:
        path: File of answers.
        samples: The file in which the questions are.
        questions: All that are in it.

    Raises:
        UserError: Naming the line of a malformed answer, one to another file or to no question,
            or one that comes twice; or the file.
    """
    by_id = {question.id: question.id for question in questions}
    by_line = {question.line: question.id for question in questions if question.line}
    answers: dict[str, list[Answer]] = {}
    for record in read_records(path):
        try:
            asked = _asked(record.value, samples, by_id, by_line)
            answer = _answer(record.value)
            given = answers.setdefault(asked, [])
            if any(other.number == answer.number for other in given):
                raise UserError(
                    f"is answer {answer.number} to question {asked!r} once more, expected one"
                )
        except UserError as error:
            raise UserError(f"{record.name}: {error}") from error
        given.append(answer)
    return answers


def _asked(
    record: Mapping[str, Any],
    samples: Path,
    by_id: Mapping[str, str],
    by_line: Mapping[int, str],
) -> str:
    """Return the id of the question that an answer belongs to."""
    if ("id" in record) == ("name" in record) or "text" not in record:
        raise UserError(f"got keys {sorted(record)}, expected 'text' and 'name' or 'id'")
    if "id" in record:
        asked = by_id.get(read_id(record["id"]))
        got = f"'id': got {shown(record['id'])}"
    else:
        name = text(record["name"], "'name'")
        file, _, line = name.rpartition(":")
        is_of_samples = Path(file).name == samples.name and line.isdecimal()
        asked = by_line.get(int(line)) if is_of_samples else None
        got = f"'name': got {name!r}"
    if asked is None:
        raise UserError(f"{got}, expected a question of {samples}; give the answers to that file")
    return asked


def _answer(record: Mapping[str, Any]) -> Answer:
    number = record.get("answer", 0)
    if type(number) is not int or number < 0:
        raise UserError(f"'answer': got {shown(number)}, expected its number, from 0")
    return Answer(
        number=number,
        text=text(record["text"], "'text'"),
        is_cut=record.get("finish") == "length",
    )
