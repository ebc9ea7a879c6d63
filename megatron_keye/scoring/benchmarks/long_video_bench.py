# SPDX-License-Identifier: Apache-2.0
"""Questions of LongVideoBench: multiple choice about videos of 8 seconds to an hour.

Its JSON lists the candidates; its parquet has a column for each of five, "N/A" for those that a
question has not.

Source: Wu et al., arXiv 2407.15754; the data set longvideobench/LongVideoBench.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_keye.data.conversation.values import number, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.benchmarks.fields import field, options
from megatron_keye.scoring.parse_choice import LETTERS
from megatron_keye.scoring.question import (
    Question,
    choice_text,
    read_id,
    read_seconds,
    user_turn,
)
from megatron_keye.scoring.truth import ChoiceTruth

_KEYS = {"id", "video_path", "question", "correct_choice", "duration"}
KEYS = {"candidates", *_KEYS}
"""Keys of a question in JSON."""
_COLUMNS = tuple(f"option{place}" for place in range(5))
TABLE_KEYS = {*_COLUMNS, *_KEYS}
"""Keys of a question in parquet."""


def read(record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield the question of an object.

    Raises:
        UserError: For values that are none of LongVideoBench's, and where the answer is withheld,
            as in its test part.
    """
    texts = options({"candidates": _candidates(record)}, "candidates")
    place = number(field(record, "correct_choice"), "'correct_choice'", "the index of an option")
    if place not in range(len(texts)):
        raise UserError(
            f"'correct_choice': got {place:g}, expected 0 to {len(texts) - 1}; the test part "
            "withholds its answers, so take the validation part"
        )
    question = text(field(record, "question"), "'question'")
    yield Question(
        id=read_id(field(record, "id")),
        task="choice",
        messages=user_turn(
            text(field(record, "video_path"), "'video_path'"), choice_text(question, texts)
        ),
        truth=ChoiceTruth.read({"letter": LETTERS[int(place)], "options": list(texts)}),
        seconds=read_seconds(field(record, "duration"), "'duration'"),
    )


def _candidates(record: Mapping[str, Any]) -> Any:
    if "candidates" in record:
        return record["candidates"]
    return [record[column] for column in _COLUMNS if record[column] not in ("N/A", None)]
