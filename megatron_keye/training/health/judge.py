# SPDX-License-Identifier: Apache-2.0
"""Decides before each update whether the step may change weights, alike on all ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.optim.measured import Measured
from megatron_keye.training.health.rerun import compare
from megatron_keye.training.health.spikes import SpikeRule
from megatron_keye.training.health.wording import not_finite
from megatron_keye.training.provenance import host_names


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong with a step."""

    reason: str
    """In words."""
    is_spike: bool
    """Whether all numbers are finite."""
    sick_ranks: dict[str, list[int]] = field(default_factory=dict)
    """Ranks by what is not finite on them."""
    sick_tensors: list[str] = field(default_factory=list)
    """Weights and moments that hold numbers which are not finite."""
    verdict: str = ""
    """What a second computation says, in words; "" without one."""
    is_irreproducible: bool = False
    """Whether it came out otherwise."""


class Judge:
    """Finds numbers that are not finite, and spikes."""

    def __init__(self, run: RunConfig) -> None:
        """Start without any step.

        Args:
            run: The rule, and whether bad steps are computed twice.
        """
        self._settings = run.training.health
        self._spikes = SpikeRule(self._settings, run.model.decoder.vocab_size)
        self.finding: Finding | None = None
        """What is wrong with the last step; None if nothing is."""

    def may_update(
        self,
        measured: Measured,
        loss: float,
        *,
        compute_again: Callable[[], Measured],
        name_sick: Callable[[], list[str]],
    ) -> bool:
        """Return whether a step may change weights. Collective: all ranks must call it.

        Args:
            measured: Figures of the step.
            loss: Mean language loss; NaN if nothing has a label.
            compute_again: Computes the step once more; the gradients are then the second ones.
            name_sick: Names sick weights and moments of all ranks.
        """
        before, self.finding = self.finding, None
        is_known = before is not None and not before.is_irreproducible
        figures = {} if math.isnan(loss) else {"loss": loss}
        figures["gradient norm"] = measured.gradient_norm
        sick = measured.sick
        spike = "" if sick else self._spikes.judge(figures)
        if sick or spike:
            again = compute_again if self._settings.reruns and not is_known else None
            self.finding = self._examine(measured, spike, again, name_sick)
        is_harmless = self.finding is None or (
            self.finding.is_spike
            and not self.finding.is_irreproducible
            and self._settings.on_spike == "warn"
        )
        if is_harmless:
            self._spikes.note(figures)
        return is_harmless

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps are compared with, ready for JSON."""
        return self._spikes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._spikes.load_state_dict(state)

    def _examine(
        self,
        measured: Measured,
        spike: str,
        compute_again: Callable[[], Measured] | None,
        name_sick: Callable[[], list[str]],
    ) -> Finding:
        """Look closer at a bad step: which ranks, which tensors, and whether it repeats."""
        verdict, is_irreproducible = "", False
        if compute_again is not None:
            comparison = compare(measured, compute_again(), self._settings.rerun_tolerance)
            verdict = comparison.in_words(host_names())
            is_irreproducible = not comparison.is_reproducible
        return Finding(
            reason=spike or not_finite(measured.sick),
            is_spike=bool(spike),
            sick_ranks=measured.sick,
            sick_tensors=[] if spike else name_sick(),
            verdict=verdict,
            is_irreproducible=is_irreproducible,
        )
