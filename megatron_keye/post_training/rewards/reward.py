"""What an answer is worth to training: by its task and by its form.

The total is g (task_weight x task + format_weight x format), where g is 0 for an answer that could
not be understood, or whose thinking did not end, and else 1.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The parts of one answer's reward; a dictionary of them is ready for JSON."""

    total: float
    """0 to the sum of both weights."""
    task: float
    """0 to 1: what the answer is worth by its task."""
    format: float
    """0 or 1: whether its form is right."""
    is_understood: bool
    """Whether it could be read; 0 in all without."""
    parts: dict[str, float] = field(default_factory=dict)
    """What else its task tells."""
