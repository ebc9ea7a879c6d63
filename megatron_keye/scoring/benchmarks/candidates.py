# SPDX-License-Identifier: Apache-2.0
"""Multiple choice whose right option is given by its text: MLVU and MVBench.

Source: Zhou et al., arXiv 2406.04264 (the development part of MLVU); Li et al., arXiv 2311.17005
(MVBench, some of whose questions are about a part of a video).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_keye.data.conversation.values import is_given, text
from megatron_keye.scoring.benchmarks.fields import field, letter_of, options
from megatron_keye.scoring.question import Question, choice_text, read_seconds, user_turn
from megatron_keye.scoring.truth import ChoiceTruth

KEYS = {"video", "question", "candidates", "answer"}
"""Keys of a question, which has no id."""


def read(record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield the question of an object.

    Raises:
        UserError: For values that are none of MLVU's or MVBench's.
    """
    texts = options(record, "candidates")
    asked = choice_text(text(field(record, "question"), "'question'"), texts)
    window = {key: record[key] for key in ("start", "end") if is_given(record.get(key))}
    seconds = record.get("duration")
    yield Question(
        id="",
        task="choice",
        messages=user_turn(text(field(record, "video"), "'video'"), asked, **window),
        truth=ChoiceTruth.read(
            {"letter": letter_of(field(record, "answer"), texts), "options": list(texts)}
        ),
        seconds=read_seconds(seconds, "'duration'") if is_given(seconds) else None,
    )
