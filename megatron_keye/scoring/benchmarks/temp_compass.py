# SPDX-License-Identifier: Apache-2.0
"""Questions of TempCompass: multiple choice about action, direction, speed, order and change.

Its sheet has an object for each video, with lists of questions by aspect; its table has a row for
each question. Options stand in the question, a line each. Its other three parts (yes or no,
matching of captions, captions) have other truths and are refused.

Source: Liu et al., arXiv 2403.00476; the data set lmms-lab/TempCompass.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_keye.data.conversation.values import shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.benchmarks.fields import field, options
from megatron_keye.scoring.question import Question, choice_text, read_id, user_turn
from megatron_keye.scoring.truth import ChoiceTruth

KEYS = {"video_id", "question", "answer", "dim"}
"""Keys of a row, which has no id."""
_OPTION = re.compile(r"[A-Z]\. ")


def read(record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield the question of a row.

    Raises:
        UserError: For values that are none of its multiple choice.
    """
    yield _question("", read_id(record["video_id"]), record)


def is_sheet(record: Any) -> bool:
    """Return whether an object is that of a video in the sheet: aspects with their questions."""
    return (
        isinstance(record, dict)
        and bool(record)
        and all(isinstance(asked, list) for asked in record.values())
        and all(isinstance(raw, dict) for asked in record.values() for raw in asked)
    )


def read_video(name: str, record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield the questions about a video of the sheet, for which `is_sheet` holds.

    Raises:
        UserError: For values that are none of its multiple choice.
    """
    for aspect, asked in record.items():
        for place, raw in enumerate(asked):
            yield _question(f"{name}-{aspect}-{place}", name, raw)


def _question(name: str, video: str, raw: Mapping[str, Any]) -> Question:
    asked = text(field(raw, "question"), "'question'")
    question, *lettered = asked.split("\n")
    answer = text(field(raw, "answer"), "'answer'")
    if not lettered or not all(map(_OPTION.match, [*lettered, answer])):
        raise UserError(
            f"got the question {shown(asked)} with the answer {shown(answer)}, expected options "
            "A. to D. in lines behind it and one of them, as TempCompass' multiple choice has"
        )
    texts = options({"options": lettered}, "options")
    return Question(
        id=name,
        task="choice",
        messages=user_turn(f"{video}.mp4", choice_text(question, texts)),
        truth=ChoiceTruth.read({"letter": answer[0], "options": list(texts)}),
    )
