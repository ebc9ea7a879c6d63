# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a function of the step alone: linear warm-up, then the run's schedule."""

import math

from megatron_keye.config.optimizer import OptimizerConfig


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Return the learning rate of a step, before the multipliers of parts.

    Args:
        step: 0-based number of the step.
        num_steps: Steps of the whole run, after which a rate that decays would reach its minimum.
        optimizer: Schedule, its lengths in steps, peak and minimum.

    Source:
        Cosine: Loshchilov and Hutter, arXiv 1608.03983. Stable, then decay: Hu et al., arXiv
        2404.06395, here with the linear decay of Haegele et al., arXiv 2405.18392.
    """
    peak, minimum = optimizer.learning_rate, optimizer.min_learning_rate
    warmup = optimizer.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    start = warmup
    if optimizer.schedule == "warmup_stable_decay":
        start = max(warmup, num_steps - optimizer.decay_steps)
    progress = min(1.0, max(0, step - start) / max(1, num_steps - start))
    return minimum + (peak - minimum) * _share_of_peak(progress, optimizer)


def _share_of_peak(progress: float, optimizer: OptimizerConfig) -> float:
    """Return how much of the way from minimum to peak is left at a share of the decay."""
    if optimizer.schedule == "constant":
        return 1.0
    if optimizer.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress
