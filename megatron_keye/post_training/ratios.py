# SPDX-License-Identifier: Apache-2.0
"""Ratios of an answer's probabilities now and before, as figures for a run's user.

The ratios that weigh the loss are those of `decoder/policy.py`; these are computed again from the
log-probabilities that its ranks noted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.decoder.policy import LARGEST_LOG_RATIO


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """The ratios of one answer."""

    mean: float
    """Geometric mean over its tokens, which is GSPO's ratio."""
    clipped: float
    """Share of its ratios, one with GSPO, that are clipped."""
    not_finite: float
    """Share of its ratios that are not finite, and weigh nothing."""

    @classmethod
    def of(
        cls, log_ratios: NDArray[np.float64], advantage: float, settings: PostTrainingConfig
    ) -> "Ratios":
        """Return those of an answer.

        Args:
            log_ratios: Log-probability now less that before, of each token [n].
            advantage: Of the answer.
            settings: One ratio an answer or a token, and where it is clipped.
        """
        mean = np.array([log_ratios.mean()])
        each = mean if settings.kind == "gspo" else log_ratios
        is_finite = np.isfinite(each)
        values = np.exp(np.clip(each[is_finite], -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
        low, high = 1 - settings.clip_low, 1 + settings.clip_high
        is_clipped = values > high if advantage > 0 else (values < low) & (advantage < 0)
        return cls(
            mean=float(np.exp(np.clip(mean[0], -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))),
            clipped=float(is_clipped.sum() / len(each)),
            not_finite=float(1 - is_finite.mean()),
        )


def passes_gate(differences: NDArray[np.float64], settings: PostTrainingConfig) -> bool:
    """Return whether an answer counts that training and generation see differently.

    Args:
        differences: Log-probability in training less that in generation, of each token [n].
        settings: The gate.

    Source: a mask of whole sequences by their geometric mean, as in NVIDIA's NeMo RL.
    """
    mean = np.exp(np.clip(differences.mean(), -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    return bool(settings.gate_low <= mean <= settings.gate_high)
