"""Linear warm-up and cosine decay of the learning rate, as a function of the step alone."""

import math

from megatron_keye.config.training import OptimizerConfig


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Return the learning rate of a step.

    Args:
        step: 0-based number of the step.
        num_steps: Steps of the whole run, after which the rate would reach its minimum.
        optimizer: Peak, minimum and warm-up.
    """
    peak, minimum, warmup = (
        optimizer.learning_rate,
        optimizer.min_learning_rate,
        optimizer.warmup_steps,
    )
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
