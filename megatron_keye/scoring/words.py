# SPDX-License-Identifier: Apache-2.0
"""Questions whose answer is a number of any kind, or a text to be read off the picture."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_keye.data.conversation.values import number, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.final_answer import final_answer, split_json
from megatron_keye.scoring.token_f1 import normal
from megatron_keye.scoring.truth import Score, Truth, check_keys

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?:\.\d{1,15})?(?:[eE][-+]?\d{1,2})?"
_ALONE = re.compile(rf"(?<![\w.,])({_NUMBER})(?![\w]|[.,]\d)")
_STATED = re.compile(
    rf"(?:\banswer\b(?:\s+is|\s*[:=])+|\\boxed\{{)[\s*_($]*({_NUMBER})", re.IGNORECASE
)
_KEYS = ("number", "answer", "value", "result")


@dataclass(frozen=True, kw_only=True)
class NumberTruth(Truth):
    """A number, whole or not."""

    metrics = ("accuracy",)
    number: float
    """The number."""
    tolerance: float
    """Largest distance that is right too."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "NumberTruth":
        """Read {"number": -3.5, "tolerance": 0.01}."""
        check_keys(raw, {"number", "tolerance"})
        return cls(
            number=number(raw["number"], "'number'", "a number"),
            tolerance=number(raw["tolerance"], "'tolerance'", "a number of 0 or more", least=0),
        )

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"number": self.number, "tolerance": self.tolerance}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return 1 for a number within the tolerance; the last that is stated, or the only one."""
        found = parse_number(answer)
        is_right = found is not None and abs(found - self.number) <= self.tolerance
        return Score(value=float(is_right), understood=found)


@dataclass(frozen=True, kw_only=True)
class TextTruth(Truth):
    """A text, as one that is written on a picture."""

    metrics = ("accuracy",)
    text: str
    """The text."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "TextTruth":
        """Read {"text": "..."}."""
        check_keys(raw, {"text"})
        words = text(raw["text"], "'text'")
        if not normal(words).strip():
            raise UserError(f"'text': got {words!r}, expected words")
        return cls(text=words)

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"text": self.text}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return 1 for the same letters and digits; case, spaces and punctuation are no matter."""
        found = final_answer(answer)
        if not found:
            return Score(value=0.0, understood=None)
        return Score(value=float(_letters(found) == _letters(self.text)), understood=found)


def parse_number(text: str) -> float | None:
    """Return the number that an answer gives.

    Read are, in this order: JSON ({"number": 3.5}), the last number that is stated ("the answer is
    -2", boxed), and the only number in the text.
    """
    answer = final_answer(text)
    if answer is None:
        return None
    values, _ = split_json(answer)
    named = [v[key] for v in values if isinstance(v, Mapping) for key in _KEYS if key in v]
    if named:
        last = named[-1]
        is_number = isinstance(last, (int, float)) and not isinstance(last, bool)
        return float(last) if is_number and math.isfinite(last) else None
    if stated := _STATED.findall(answer):
        return _value(stated[-1])
    numbers = {_value(each) for each in _ALONE.findall(answer)}
    return numbers.pop() if len(numbers) == 1 else None


def _value(written: str) -> float:
    return float(written.replace(",", ""))


def _letters(words: str) -> str:
    return re.sub(r"[\W_]+", "", normal(words))
