# SPDX-License-Identifier: Apache-2.0
"""Settings of what a run does about numbers that are not finite, or far from those before."""

from dataclasses import dataclass
from typing import Literal

from megatron_keye.config.check import check, check_numbers

SpikeAction = Literal["warn", "skip", "stop", "roll_back"]

FEWEST_STEPS = 8
"""Steps before a spike can be told from the noise of the first ones."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What a run does about bad steps: numbers that are not finite, and spikes.

    A step with a loss, gradient, moment or trained weight that is not finite never changes a
    weight. Every bad step writes its samples and what runs it again to bad_steps/ of the run's
    folder.
    """

    max_bad_steps: int = 10
    """Bad steps in a row, none of which changed a weight, at which after_bad_steps applies."""
    after_bad_steps: Literal["stop", "roll_back"] = "stop"
    """"stop" ends the run. "roll_back" goes on from the newest checkpoint, with the rows behind
    those that were read since."""
    on_spike: SpikeAction = "warn"
    """What follows a loss or gradient norm far above those before. "warn" trains on it, "skip"
    changes no weight, "stop" ends the run, "roll_back" goes on from the newest checkpoint, with
    the rows behind the spike."""
    spike_score: float = 10.0
    """Least robust z-score of a spike: how far a value lies above the median of the steps before,
    in standard deviations as their median absolute deviation estimates them. A loss that has risen
    far above that of guessing is one from the second step on. 0: nothing is one."""
    window_steps: int = 100
    """Steps before a step with which it is compared; 8 must be there for a score."""
    max_roll_backs: int = 3
    """Most times in a row that the run goes back to the same checkpoint."""
    reruns: bool = True
    """Whether the first of several bad steps is computed once more from the same weights and rows.
    If the result is another one, hardware is suspect, and the step changes no weight."""
    rerun_tolerance: float = 1e-3
    """Largest relative difference between both that counts as none, since GPUs add in no fixed
    order; 0 demands the same bits."""
    on_irreproducible: Literal["skip", "stop"] = "skip"
    """Whether the run goes on after a bad step that came out otherwise the second time; ranks and
    hosts are named."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "training.health",
            above_zero="max_bad_steps window_steps max_roll_backs",
            zero_or_more="spike_score rerun_tolerance",
        )
        choices = {
            "after_bad_steps": ("stop", "roll_back"),
            "on_spike": ("warn", "skip", "stop", "roll_back"),
            "on_irreproducible": ("skip", "stop"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            check(value in known, f"training.health.{name}", value, f"one of {known}")
        check(
            self.window_steps >= FEWEST_STEPS,
            "training.health.window_steps",
            self.window_steps,
            f"{FEWEST_STEPS} or more",
        )
