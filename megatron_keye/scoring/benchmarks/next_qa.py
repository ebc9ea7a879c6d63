# SPDX-License-Identifier: Apache-2.0
"""Questions of NExT-QA and NExT-GQA: multiple choice among five, about causes and order in time.

Their tables are CSV or parquet. NExT-QA calls its videos "video" and gives the right option's
place; NExT-GQA says "video_id" and gives its text.

Source: Xiao et al., CVPR 2021 (NExT-QA), arXiv 2309.01327 (NExT-GQA).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_keye.data.conversation.values import shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.benchmarks.fields import field, letter_of
from megatron_keye.scoring.parse_choice import LETTERS
from megatron_keye.scoring.question import Question, choice_text, read_id, user_turn
from megatron_keye.scoring.truth import ChoiceTruth

_OPTIONS = ("a0", "a1", "a2", "a3", "a4")
_KEYS = {"question", "answer", "qid", *_OPTIONS}
KEYS = {"video", *_KEYS}
"""Keys of a row of NExT-QA."""
GROUNDED_KEYS = {"video_id", *_KEYS}
"""Keys of a row of NExT-GQA."""


def read(record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield the question of a row.

    Raises:
        UserError: For values that are none of theirs.
    """
    # Options of one word may be numbers, which a table of parquet has as text.
    texts = tuple(text(record[key], repr(key)) for key in _OPTIONS)
    video = read_id(field(record, "video", "video_id"))
    answer = record["answer"]
    letter = _letter_at(answer) if "video" in record else letter_of(answer, texts)
    asked = choice_text(text(record["question"], "'question'"), texts)
    yield Question(
        id=f"{video}-{read_id(record['qid'])}",
        task="choice",
        messages=user_turn(f"{video}.mp4", asked),
        truth=ChoiceTruth.read({"letter": letter, "options": list(texts)}),
    )


def _letter_at(answer: Any) -> str:
    places = [str(place) for place in range(len(_OPTIONS))]
    if str(answer) not in places:
        raise UserError(f"'answer': got {shown(answer)}, expected the place of an option, 0 to 4")
    return LETTERS[places.index(str(answer))]
