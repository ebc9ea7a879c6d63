"""Answers of a model, from the JSON lines that `megatron-keye generate` writes.

A line is {"id": ..., "answer": "..."}: the id of the question, which is the number of its line
where it has none, and the text. A question may have several answers. "finish": "length" says that
the text was cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_keye.data.conversation.values import text
from megatron_keye.errors import UserError
from megatron_keye.scoring.question import read_id
from megatron_keye.scoring.record_file import read_records


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One text of a model."""

    id: str
    """The question that it answers."""
    text: str
    """What the model wrote."""
    is_cut: bool = False
    """Whether it ends at a limit of tokens and not by itself."""


def read_answers(path: Path) -> dict[str, list[Answer]]:
    """Return the answers of a file by the ids of their questions.

    Raises:
        UserError: Naming the line of a malformed one, or the file.
    """
    answers: dict[str, list[Answer]] = {}
    for record in read_records(path):
        try:
            answer = _answer(record.value)
        except UserError as error:
            raise UserError(f"{record.name}: {error}") from error
        answers.setdefault(answer.id, []).append(answer)
    return answers


def _answer(record: Mapping[str, Any]) -> Answer:
    missing = {"id", "answer"} - record.keys()
    if missing:
        raise UserError(f"got keys {sorted(record)}, expected 'id' and 'answer'")
    return Answer(
        id=read_id(record["id"]),
        text=text(record["answer"], "'answer'"),
        is_cut=record.get("finish") == "length",
    )
