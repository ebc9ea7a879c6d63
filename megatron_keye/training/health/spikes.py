# SPDX-License-Identifier: Apache-2.0
"""Tells a spike of the loss or of the gradient norm from what the steps before lead to expect."""

import math
from collections import deque
from statistics import median
from typing import Any

from megatron_keye.config.health import FEWEST_STEPS, HealthConfig

_DEVIATIONS_PER_MAD = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution."""
_GUESSING_FACTOR = 1.5
"""A loss that is so many times that of guessing, and of the best step, is no noise."""
_LEAST_SHARE = 0.02
"""Least deviation as a share of the median, since that of a few like values is near 0."""


def robust_score(value: float, before: list[float]) -> float:
    """Return how many standard deviations a value lies above the median of those before.

    Args:
        value: A number, finite.
        before: Earlier ones of the same kind, at least one.

    Source:
        The modified z-score of Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993),
        with a floor for its denominator.
    """
    middle = median(before)
    spread = median(abs(each - middle) for each in before)
    deviation = max(_DEVIATIONS_PER_MAD * spread, _LEAST_SHARE * abs(middle), 1e-30)
    return (value - middle) / deviation


class SpikeRule:
    """The figures of the last steps, and whether those of one more are a spike."""

    def __init__(self, settings: HealthConfig, vocab_size: int) -> None:
        """Start without any step.

        Args:
            settings: Least score and window.
            vocab_size: Tokens that a guess chooses from.
        """
        self._least, self._guess = settings.spike_score, math.log(vocab_size)
        self._before: dict[str, deque[float]] = {
            name: deque(maxlen=settings.window_steps) for name in ("loss", "gradient norm")
        }

    def judge(self, figures: dict[str, float]) -> str:
        """Return in words what is a spike; "" if nothing is.

        Args:
            figures: "loss", unless the step has none, and "gradient norm", all finite.
        """
        if not self._least:
            return ""
        found = []
        for name, value in figures.items():
            before = list(self._before[name])
            if name == "loss" and before and value > self._limit(before):
                found.append(
                    f"loss {value:.4g} is over {_GUESSING_FACTOR} times that of guessing, "
                    f"{self._guess:.4g}, and was {min(before):.4g}"
                )
                continue
            if len(before) < FEWEST_STEPS:
                continue
            score = robust_score(value, before)
            if score >= self._least:
                found.append(
                    f"{name} {value:.4g} is {score:.3g} standard deviations above "
                    f"{median(before):.4g}, the median of {len(before)} steps"
                )
        return ", ".join(found)

    def _limit(self, losses: list[float]) -> float:
        return _GUESSING_FACTOR * max(self._guess, min(losses))

    def note(self, figures: dict[str, float]) -> None:
        """Add a step that weights were changed by."""
        for name, value in figures.items():
            self._before[name].append(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the last steps, ready for JSON."""
        return {name: list(values) for name, values in self._before.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; from no step with an empty one."""
        for name, values in self._before.items():
            values.clear()
            values.extend(state.get(name, []))
