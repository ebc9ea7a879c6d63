# SPDX-License-Identifier: Apache-2.0
"""A question about a video with its right answer, as a line of a sample file has it.

The line is a conversation as training reads it, with the keys "task" and "truth" beside the turns.
An answer of the assistant at its end is what training predicts, and no part of the question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_keye.data.conversation.values import number, shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.parse_choice import LETTERS
from megatron_keye.scoring.tasks import TRUTHS
from megatron_keye.scoring.truth import Task, Truth

KEYS = {"messages", "task", "truth"}
"""Keys that every question has."""
OF_VIDEO = ("seconds", "length")
"""Keys of a truth that say how long the video is, which need not be there."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and what is right."""

    id: str
    """Name by which its answers are known."""
    line: int = 0
    """Line of its file, from 1, by which they may also be known; 0 in files of other forms, which
    a model does not read."""
    task: Task
    """What kind of question."""
    messages: tuple[dict[str, Any], ...]
    """Turns up to the question, as a sample file has them."""
    truth: Truth
    """The right answer."""
    seconds: float | None = None
    """Length of the video, if it is known."""
    length: str = ""
    """Class of lengths that a benchmark gives in place of seconds, such as "short"."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """What else the record has, such as limits of its media, or tools."""

    def written(self) -> dict[str, Any]:
        """Return its line, which `read_question` reads and a model answers."""
        of_video = {"seconds": self.seconds, "length": self.length or None}
        known = {key: value for key, value in of_video.items() if value is not None}
        return {
            **self.others,
            "id": self.id,
            "messages": list(self.messages),
            "task": self.task,
            "truth": self.truth.written() | known,
        }


def read_question(record: Mapping[str, Any], name: str, line: int) -> Question:
    """Read a question from its line.

    Args:
        record: The object of the line.
        name: File and line, for error messages.
        line: Number of the line, also the id of a question without one.

    Raises:
        UserError: Naming the line, and saying what was got and expected.
    """
    try:
        task = text(record["task"], "'task'")
        if task not in TRUTHS:
            raise UserError(f"'task': got {task!r}, expected one of {', '.join(TRUTHS)}")
        truth = record["truth"]
        if not isinstance(truth, dict):
            raise UserError(f"'truth': got {shown(truth)}, expected an object")
        rest = {key: value for key, value in truth.items() if key not in OF_VIDEO}
        seconds = truth.get("seconds")
        return Question(
            id=read_id(record.get("id", line)),
            line=line,
            task=task,
            messages=_question_turns(record["messages"]),
            truth=TRUTHS[task].read(rest),
            seconds=None if seconds is None else read_seconds(seconds, "'seconds'"),
            length=text(truth.get("length", ""), "'length'"),
            others={key: value for key, value in record.items() if key not in {"id", *KEYS}},
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def read_id(value: Any) -> str:
    """Return an id, which may be text or a whole number.

    Raises:
        UserError: For anything else.
    """
    if type(value) not in (int, str) or value == "":
        raise UserError(f"'id': got {shown(value)}, expected text or a whole number")
    return str(value)


def read_seconds(value: Any, name: str) -> float:
    """Return the length of a video.

    Raises:
        UserError: For anything but a number above 0.
    """
    return number(value, name, "seconds above 0", least=1e-9)


def user_turn(video: str, question: str, **window: Any) -> tuple[dict[str, Any], ...]:
    """Return the turns of one question about one video.

    Args:
        video: Name of the video.
        question: The text.
        window: "start" and "end", in seconds, of the part that is shown; without both, all of it.
    """
    content = [{"type": "video", "video": video, **window}, {"type": "text", "text": question}]
    return ({"role": "user", "content": content},)


def choice_text(question: str, options: Sequence[str]) -> str:
    """Return a multiple-choice question with its options, a line each."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, "Answer with the letter."])


def _question_turns(messages: Any) -> tuple[dict[str, Any], ...]:
    """Return the turns before the assistant's last answer."""
    is_list = isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages)
    turns = messages if is_list else []
    if turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    if not turns:
        raise UserError(f"'messages': got {shown(messages)}, expected turns with a question")
    return tuple(turns)
