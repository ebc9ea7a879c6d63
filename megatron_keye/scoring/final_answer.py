# SPDX-License-Identifier: Apache-2.0
"""What of a model's text is its answer, without its thinking and without tags."""

import re
from json import JSONDecoder
from typing import Any

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_OPENING = re.compile(r"[\[{]")
_MOST_FAILURES = 100
"""Brackets that begin no JSON, after which all is text: an answer may repeat them endlessly."""
_DECODER = JSONDecoder()


def final_answer(text: str) -> str | None:
    """Return the answer of a text.

    Returns:
        What follows the thinking (<think>...</think>), and of it the last <answer>...</answer> if
        there is any; None where thinking did not end, so that no answer was given.
    """
    _, mark, rest = text.rpartition("</think>")
    if "<think>" in rest:
        return None
    tagged = _ANSWER.findall(rest)
    return (tagged[-1] if tagged else rest).strip()


def split_json(text: str) -> tuple[list[Any], str]:
    """Return the JSON lists and objects in a text, the outermost of each, and the text without."""
    values, rest, place, num_failures = [], "", 0, 0
    while num_failures < _MOST_FAILURES and (found := _OPENING.search(text, place)) is not None:
        rest += text[place : found.start()]
        try:
            value, place = _DECODER.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            rest += found[0]
            place = found.end()
            num_failures += 1
        else:
            values.append(value)
            rest += " "
    return values, rest + text[place:]
