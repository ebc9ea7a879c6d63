# SPDX-License-Identifier: Apache-2.0
"""Reads the letter of an answer to a multiple-choice question, in all forms that models write."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_keye.scoring.final_answer import final_answer, split_json

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Names of the options, in order."""
_KEYS = ("answer", "choice", "option", "letter", "final_answer")
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice)\b[\s*_]{0,9}(?:is|:|=|would\s+be|should\s+be)?[\s*_]{0,9}"
    r"(?:(?:option|choice|letter)\s*)?|\\boxed\{\s*(?:\\text\{)?)"
    r"[(\[*_\"'`]*(?P<letter>[A-Za-z])(?![\w'])"
    r"(?P<more>\s*(?:,|/|&|\bor\b|\band\b)\s*\(?(?-i:[A-HJ-Z])\b)?",
    re.IGNORECASE,
)
_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_IN_FRONT = re.compile(r"[\s(\[*_\"'`]*([A-Z])[)\]*_\"'`]*\s*(?:[.):,\]]|-\s|\n)\s*\S")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_SINGLE = re.compile(r"(?<![\w'])([B-HJ-Z]|A(?=\s*(?:,|/|&|or\b|and\b)\s*[B-Z]\b))(?![\w'])")
"""A and I are also words."""


def parse_choice(text: str, options: Sequence[str]) -> str | None:
    """Return the letter that an answer chooses.

    Read are, in this order: JSON ({"answer": "B"}), a letter alone ("B", "(b).", "**B**"), a
    letter that is stated ("The answer is (B)", "Option B", boxed), one in front ("B. The red
    ball"), the text of exactly one option, and a capital letter that is the only one.

    Args:
        text: The model's text.
        options: Texts of the options A, B, ..., without their letters.

    Returns:
        A capital letter; None for an answer that names none of the options, or several.
    """
    answer = final_answer(text)
    if not answer:
        return None
    letter = _of_json(answer) or _of_text(answer, options)
    is_option = letter is not None and letter in LETTERS[: len(options)]
    return letter if is_option else None


def _of_json(answer: str) -> str | None:
    """Return the letter in the last JSON object that has one."""
    letters = [_letter_in(value) for value in split_json(answer)[0]]
    found = [letter for letter in letters if letter]
    return found[-1] if found else None


def _letter_in(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return None
    texts = [value[key] for key in _KEYS if isinstance(value.get(key), str)]
    match = _ALONE.fullmatch(texts[0]) if len(texts) == 1 else None
    return match[1].upper() if match else None


def _of_text(answer: str, options: Sequence[str]) -> str | None:
    if match := _ALONE.fullmatch(answer):
        return match[1].upper()
    # "a" may be the article: "the answer is a dog".
    stated = [m for m in _STATED.finditer(answer) if m["letter"] != "a" or m.end() == len(answer)]
    if stated:
        # What is said last counts, as in "the answer is not A; the answer is B".
        return None if stated[-1]["more"] else stated[-1]["letter"].upper()
    if match := _IN_FRONT.match(answer):
        return match[1]
    if (letter := _of_option(answer, options)) is not None:
        return letter
    letters = set(_BRACKETED.findall(answer)) or set(_SINGLE.findall(answer))
    return letters.pop() if len(letters) == 1 else None


def _of_option(answer: str, options: Sequence[str]) -> str | None:
    """Return the letter of the only option whose text is in the answer, or is the answer."""
    plain = _plain(answer)
    texts = [_plain(option) for option in options]
    for chosen in (
        [place for place, text in enumerate(texts) if text == plain],
        [place for place, text in enumerate(texts) if text and f" {text} " in f" {plain} "],
    ):
        if len(chosen) == 1:
            return LETTERS[chosen[0]]
    return None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
