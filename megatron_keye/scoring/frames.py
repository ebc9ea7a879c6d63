# SPDX-License-Identifier: Apache-2.0
"""Questions about single frames: when one is shown, and in which order things come."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_keye.data.conversation.values import number, shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.final_answer import final_answer
from megatron_keye.scoring.times import find_times
from megatron_keye.scoring.truth import Score, Truth, check_keys


@dataclass(frozen=True, kw_only=True)
class TimestampTruth(Truth):
    """When one frame is shown."""

    metrics = ("closeness",)
    time: float
    """Seconds."""
    tolerance: float
    """Seconds beside it that score 0; two distances of frames are usual."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "TimestampTruth":
        """Read {"time": 12.5, "tolerance": 1.0}."""
        check_keys(raw, {"time", "tolerance"})
        return cls(
            time=number(raw["time"], "'time'", "seconds, 0 or more", least=0),
            tolerance=number(raw["tolerance"], "'tolerance'", "seconds above 0", least=1e-9),
        )

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"time": self.time, "tolerance": self.tolerance}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return 1 - distance / tolerance, at least 0; the answer names one time."""
        found = _single_time(final_answer(answer))
        if found is None:
            return Score(value=0.0, understood=None)
        return Score(value=max(0.0, 1 - abs(found - self.time) / self.tolerance), understood=found)


@dataclass(frozen=True, kw_only=True)
class OrderTruth(Truth):
    """In which order things come."""

    metrics = ("accuracy",)
    items: tuple[str, ...]
    """Their names in order, none of which is a part of another."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "OrderTruth":
        """Read {"items": ["...", "..."]}."""
        check_keys(raw, {"items"})
        items = raw["items"]
        if not isinstance(items, list) or len(items) < 2:
            raise UserError(f"'items': got {shown(items)}, expected a list of 2 or more texts")
        names = [_plain(text(item, "'items'")) for item in items]
        for place, name in enumerate(names):
            others = [*names[:place], *names[place + 1 :]]
            if not name or any(f" {name} " in f" {other} " for other in others):
                raise UserError(
                    f"'items': got {shown(items)}, expected names of which none is empty or a "
                    "part of another"
                )
        return cls(items=tuple(items))

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"items": list(self.items)}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return 1 if the answer names each thing once, and in this order."""
        words = f" {_plain(final_answer(answer) or '')} "
        places = sorted(
            (match.start(), name)
            for name in self.items
            for match in re.finditer(f"(?= {re.escape(_plain(name))} )", words)
        )
        understood = [name for _, name in places]
        return Score(value=float(understood == list(self.items)), understood=understood or None)

    def blind_score(self, seconds: float | None) -> float:
        """Return the share of an order that is drawn."""
        return 1 / math.factorial(len(self.items))


def _single_time(answer: str | None) -> float | None:
    """Return the only time of an answer; of several, the only one with a unit."""
    times = list(find_times(answer or ""))
    with_unit = [time for time in times if not time.is_bare]
    known = {time.seconds for time in with_unit or times}
    found = known.pop() if len(known) == 1 else math.inf
    return found if math.isfinite(found) else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
