# SPDX-License-Identifier: Apache-2.0
"""Reads the number in an answer to a question of how many, or how often."""

import re
from collections.abc import Mapping
from typing import Any

from megatron_keye.scoring.final_answer import final_answer, split_json
from megatron_keye.scoring.times import find_times

_WORDS = {
    **{"no": 0, "none": 0, "never": 0, "zero": 0, "once": 1, "twice": 2, "thrice": 3},
    **{"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8},
    **{"nine": 9, "ten": 10, "eleven": 11, "twelve": 12},
}
_NUMBER = rf"(?:\d{{1,3}}(?:,\d{{3}}){{1,4}}|\d{{1,15}}|\b(?:{'|'.join(_WORDS)})\b)"
_WHOLE = re.compile(rf"(?<![\w.,-])({_NUMBER})(?:\.0+)?(?!\.?\d|%)", re.IGNORECASE)
_TIMES = re.compile(rf"(?<![\w.,-])({_NUMBER})\s*(?:times\b|x\b|\u00d7)", re.IGNORECASE)
_STATED = re.compile(
    rf"(?:\b(?:answer|count|total|number)\b(?:\s+\w+){{0,3}}?\s*(?:is|:|=|of)|\\boxed\{{)"
    rf"[\s*_(]*({_NUMBER})(?!\.?\d|%)",
    re.IGNORECASE,
)
_KEYS = ("count", "number", "answer", "total")


def parse_count(text: str) -> int | None:
    """Return the whole number that an answer gives.

    Read are, in this order: JSON ({"count": 3}), a number that is stated ("the answer is 3"), one
    that counts ("3 times", "twice"), and the only number in the text. Digits and words up to
    twelve are read; numbers of seconds and clock times are none.

    Returns:
        0 or more; None for an answer without a number, or with several of which none is stated.
    """
    answer = final_answer(text)
    if answer is None:
        return None
    counts = [_of_json(value) for value in split_json(answer)[0]]
    if known := [count for count in counts if count is not None]:
        return known[-1]
    if stated := _STATED.findall(answer):
        return _number(stated[-1])
    rest = _without_times(answer)
    for pattern in (_TIMES, _WHOLE):
        numbers = {_number(match) for match in pattern.findall(rest)}
        if len(numbers) == 1:
            return numbers.pop()
        if numbers:
            return None
    return None


def _of_json(value: Any) -> int | None:
    if not isinstance(value, Mapping):
        return None
    counts = [value[key] for key in _KEYS if key in value]
    if len(counts) != 1 or isinstance(counts[0], bool):
        return None
    count = counts[0]
    if isinstance(count, str) and (match := _WHOLE.fullmatch(count.strip())):
        return _number(match[1])
    is_whole = isinstance(count, int) or (isinstance(count, float) and count.is_integer())
    return int(count) if is_whole and count >= 0 else None


def _without_times(text: str) -> str:
    """Return the text without its times of the video, of which a bare number is none."""
    pieces, place = [], 0
    for time in find_times(text):
        if not time.is_bare:
            pieces.append(text[place : time.start])
            place = time.stop
    return " ".join([*pieces, text[place:]])


def _number(text: str) -> int:
    word = text.lower()
    return _WORDS[word] if word in _WORDS else int(word.replace(",", ""))
