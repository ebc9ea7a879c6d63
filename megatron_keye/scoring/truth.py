# SPDX-License-Identifier: Apache-2.0
"""What is right, by kind of question, and how an answer is scored against it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_keye.data.conversation.values import number, shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.final_answer import final_answer
from megatron_keye.scoring.intervals import RECALL_THRESHOLDS, Interval, temporal_iou
from megatron_keye.scoring.parse_choice import LETTERS, parse_choice
from megatron_keye.scoring.parse_count import parse_count
from megatron_keye.scoring.parse_intervals import parse_intervals
from megatron_keye.scoring.token_f1 import token_f1

Task = Literal[
    "grounding",
    "choice",
    "count",
    "caption",
    "scenes",
    "timestamp",
    "order",
    "boxes",
    "number",
    "expression",
    "text",
]


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one answer is worth."""

    value: float
    """0 to 1: the overlap of stretches, 1 for what is right, or the F1 of words."""
    understood: Any
    """The answer as it was understood, ready for JSON; None where it was not, which scores 0."""


class Truth(ABC):
    """The right answer to a question."""

    metrics: ClassVar[tuple[str, ...]]
    """Names of the means that describe many answers; `measures` gives the terms of each."""

    @classmethod
    @abstractmethod
    def read(cls, raw: Mapping[str, Any]) -> "Truth":
        """Read it from a record; UserError for a malformed one."""

    @abstractmethod
    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""

    @abstractmethod
    def score(self, answer: str, seconds: float | None) -> Score:
        """Score a model's text about a video of that length, None where it is not known."""

    def measures(self, value: float) -> tuple[float, ...]:
        """Return what an answer of a score adds to each of `metrics`."""
        return (value,)

    def blind_score(self, seconds: float | None) -> float | None:
        """Return the mean score of answers that look at nothing; None where it is not known."""
        return None


@dataclass(frozen=True, kw_only=True)
class GroundingTruth(Truth):
    """When something happens."""

    metrics = ("mIoU", *(f"R1@{threshold}" for threshold in RECALL_THRESHOLDS))
    intervals: tuple[Interval, ...]
    """Stretches in seconds; none where it does not happen."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "GroundingTruth":
        """Read {"intervals": [[start, end], ...]}."""
        check_keys(raw, {"intervals"})
        intervals = raw["intervals"]
        if not isinstance(intervals, list):
            raise UserError(f"'intervals': got {shown(intervals)}, expected a list of pairs")
        return cls(intervals=tuple(map(read_interval, intervals)))

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"intervals": [list(interval) for interval in self.intervals]}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return the temporal intersection over union."""
        intervals = parse_intervals(answer)
        if intervals is None:
            return Score(value=0.0, understood=None)
        # JSON has no infinity: an end left open is written as null.
        understood = [[start, end if end < float("inf") else None] for start, end in intervals]
        return Score(value=temporal_iou(intervals, self.intervals, seconds), understood=understood)

    def blind_score(self, seconds: float | None) -> float | None:
        """Return the overlap with the whole video."""
        if seconds is None:
            return None
        return temporal_iou([(0.0, seconds)], self.intervals, seconds)

    def measures(self, value: float) -> tuple[float, ...]:
        """Return the overlap, and whether it reaches each threshold."""
        return (value, *(float(value >= threshold) for threshold in RECALL_THRESHOLDS))


@dataclass(frozen=True, kw_only=True)
class ChoiceTruth(Truth):
    """Which of several options is right."""

    metrics = ("accuracy",)
    letter: str
    """A for the first option."""
    options: tuple[str, ...]
    """Their texts, without letters."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "ChoiceTruth":
        """Read {"letter": "B", "options": ["...", "..."]}."""
        check_keys(raw, {"letter", "options"})
        options = raw["options"]
        if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
            raise UserError(
                f"'options': got {shown(options)}, expected a list of 2 to {len(LETTERS)} texts"
            )
        letters = LETTERS[: len(options)]
        letter = text(raw["letter"], "'letter'")
        if len(letter) != 1 or letter not in letters:
            raise UserError(f"'letter': got {letter!r}, expected one of {letters}")
        return cls(letter=letter, options=tuple(text(each, "'options'") for each in options))

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"letter": self.letter, "options": list(self.options)}

    def blind_score(self, seconds: float | None) -> float:
        """Return the share of a letter that is drawn."""
        return 1 / len(self.options)

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return 1 for the right letter."""
        letter = parse_choice(answer, self.options)
        return Score(value=float(letter == self.letter), understood=letter)


@dataclass(frozen=True, kw_only=True)
class CountTruth(Truth):
    """How many, or how often."""

    metrics = ("accuracy",)
    number: int
    """The number."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "CountTruth":
        """Read {"number": 3}."""
        check_keys(raw, {"number"})
        found = number(raw["number"], "'number'", "a whole number, 0 or more", least=0)
        if found != int(found):
            raise UserError(f"'number': got {found}, expected a whole number, 0 or more")
        return cls(number=int(found))

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"number": self.number}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return 1 for the right number."""
        count = parse_count(answer)
        return Score(value=float(count == self.number), understood=count)


@dataclass(frozen=True, kw_only=True)
class CaptionTruth(Truth):
    """What a video shows, in words."""

    metrics = ("token F1",)
    text: str
    """The text that answers are compared with."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "CaptionTruth":
        """Read {"text": "..."}."""
        check_keys(raw, {"text"})
        caption = text(raw["text"], "'text'")
        if not caption.strip():
            raise UserError(f"'text': got {caption!r}, expected words")
        return cls(text=caption)

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"text": self.text}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return the token F1; an empty answer is not understood."""
        caption = final_answer(answer)
        if not caption:
            return Score(value=0.0, understood=None)
        return Score(value=token_f1(caption, self.text), understood=caption)


def read_interval(raw: Any) -> Interval:
    """Read [start, end].

    Raises:
        UserError: For anything else, and for an end before its start.
    """
    expected = "[start, end] in seconds, 0 or more, the end not before the start"
    if not isinstance(raw, list) or len(raw) != 2:
        raise UserError(f"got {shown(raw)}, expected {expected}")
    start, end = (number(bound, shown(raw), expected, least=0) for bound in raw)
    if end < start:
        raise UserError(f"got {shown(raw)}, expected {expected}")
    return start, end


def check_keys(raw: Mapping[str, Any], expected: set[str]) -> None:
    """Raise a UserError unless a truth has these keys and no others."""
    if raw.keys() != expected:
        raise UserError(f"got keys {sorted(raw)}, expected {sorted(expected)}")
