# SPDX-License-Identifier: Apache-2.0
"""Sums over the steps of a process, from which the summary of its run is made."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_keye.training.metrics import StepMetrics


@dataclass
class StepSums:
    """What the steps of this process say about its speed and its input.

    Rates are over all steps but the first, which also warms up allocators and the video decoder.
    """

    num_steps: int = 0
    last_loss: float = math.nan
    peak_memory_gib: float = 0.0
    pictures: int = 0
    padding_shares: float = 0.0
    num_timed: int = 0
    seconds: float = 0.0
    """Of the steps that count for rates, as all below."""
    tokens: int = 0
    device_teraflops: float = 0.0
    """Model FLOPs of one device, in 1e12."""
    used_seconds: float = 0.0
    """Seconds at the device's peak that the model FLOPs take."""

    def add(self, metrics: StepMetrics) -> None:
        """Add a step."""
        self.num_steps += 1
        self.last_loss = metrics.loss
        self.peak_memory_gib = max(self.peak_memory_gib, metrics.peak_memory_gib)
        self.pictures += metrics.pictures
        self.padding_shares += metrics.padding_share
        if self.num_steps == 2:
            self.num_timed, self.tokens = 0, 0
            self.seconds = self.device_teraflops = self.used_seconds = 0.0
        self.num_timed += 1
        self.seconds += metrics.step_seconds
        self.tokens += metrics.tokens
        self.device_teraflops += metrics.tflops_per_device * metrics.step_seconds
        self.used_seconds += metrics.mfu * metrics.step_seconds

    def figures(self) -> dict[str, Any]:
        """Return the figures of the summary; there must have been a step."""
        mfu = self.used_seconds / self.seconds
        return {
            "last_loss": self.last_loss,
            "tokens_per_second": self.tokens / self.seconds,
            "tflops_per_device": self.device_teraflops / self.seconds,
            **({} if math.isnan(mfu) else {"mfu": mfu}),
            "step_seconds": self.seconds / self.num_timed,
            "peak_memory_gib": self.peak_memory_gib,
            "pictures": self.pictures,
            "padding_share": self.padding_shares / self.num_steps,
        }
