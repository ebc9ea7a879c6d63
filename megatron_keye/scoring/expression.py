# SPDX-License-Identifier: Apache-2.0
"""Questions whose answer is a mathematical expression, which has many right spellings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_keye.data.conversation.values import text
from megatron_keye.errors import UserError
from megatron_keye.scoring.extras import import_for_task
from megatron_keye.scoring.final_answer import final_answer
from megatron_keye.scoring.truth import Score, Truth, check_keys

_LIMIT_SECONDS = 2
"""Longest that an expression is read, or two are compared; math-verify counts whole seconds."""


@dataclass(frozen=True, kw_only=True)
class ExpressionTruth(Truth):
    """A number or a term, right if it means the same; compared by math-verify."""

    metrics = ("accuracy",)
    expression: str
    """In LaTeX, without dollar signs."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "ExpressionTruth":
        r"""Read {"expression": "\\frac{1}{2}"}; also refused without math-verify."""
        check_keys(raw, {"expression"})
        written = text(raw["expression"], "'expression'")
        # What cannot be read comes back as text alone.
        if not any(not isinstance(each, str) for each in _read(f"${written}$")):
            raise UserError(
                f"'expression': got {written!r}, expected a number or a term in LaTeX, without "
                "dollar signs"
            )
        return cls(expression=written)

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"expression": self.expression}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return 1 if the expression that an answer ends with, or boxes, means the same.

        Two that are not told apart in 2 seconds are different. Only a main thread can score.
        """
        found = _read(final_answer(answer) or "")
        if not found:
            return Score(value=0.0, understood=None)
        right = _read(f"${self.expression}$")
        is_right = _math_verify().verify(right, found, timeout_seconds=_LIMIT_SECONDS)
        return Score(value=float(is_right), understood=str(found[-1]))


def _read(written: str) -> list[Any]:
    """Return an expression and its text, as math-verify understands them; [] if it does not."""
    parsed: list[Any] = _math_verify().parse(written, parsing_timeout=_LIMIT_SECONDS)
    return parsed


def _math_verify() -> Any:
    return import_for_task("expression", "math_verify", "math-verify")
