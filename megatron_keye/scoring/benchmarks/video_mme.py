# SPDX-License-Identifier: Apache-2.0
"""Questions of Video-MME: multiple choice, by three classes of length.

Its table has a row for each question; its sheet for answers has an object for each video with a
list of its questions.

Source: Fu et al., arXiv 2405.21075; the data set lmms-lab/Video-MME.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from megatron_keye.data.conversation.values import shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.benchmarks.fields import field, options
from megatron_keye.scoring.question import Question, choice_text, read_id, user_turn
from megatron_keye.scoring.truth import ChoiceTruth

KEYS = {"video_id", "duration", "question_id", "question", "options", "answer"}
"""Keys of a row."""
SHEET_KEYS = {"video_id", "duration", "questions"}
"""Keys of a video in the sheet for answers."""
_LENGTHS = ("short", "medium", "long")


def read(record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield the question of a row, or those of a video.

    Raises:
        UserError: For values that are none of Video-MME's.
    """
    questions = record.get("questions", [record])
    if not isinstance(questions, list) or not all(isinstance(each, dict) for each in questions):
        raise UserError(f"'questions': got {shown(questions)}, expected a list of objects")
    for question in questions:
        yield _question(record, question)


def _question(video: Mapping[str, Any], raw: Mapping[str, Any]) -> Question:
    length = text(field(video, "duration"), "'duration'")
    if length not in _LENGTHS:
        raise UserError(f"'duration': got {length!r}, expected one of {', '.join(_LENGTHS)}")
    texts = options(raw, "options")
    letter = text(field(raw, "answer"), "'answer'")
    return Question(
        id=read_id(field(raw, "question_id")),
        task="choice",
        messages=user_turn(_file(video), choice_text(field(raw, "question"), texts)),
        truth=ChoiceTruth.read({"letter": letter, "options": list(texts)}),
        length=length,
    )


def _file(video: Mapping[str, Any]) -> str:
    """Return the name of the file, which is the video's at its source."""
    at_source = parse_qs(urlsplit(str(video.get("url", ""))).query).get("v", [])
    name = video.get("videoID") or (at_source[0] if at_source else field(video, "video_id"))
    return f"{read_id(name)}.mp4"
