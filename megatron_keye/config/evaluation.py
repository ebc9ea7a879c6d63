# SPDX-License-Identifier: Apache-2.0
"""Settings of the questions that a run answers while it trains."""

from dataclasses import dataclass

from megatron_keye.config.check import check, check_numbers

TASKS = (
    *("grounding", "choice", "count", "caption"),
    *("scenes", "timestamp", "order", "boxes", "number", "expression", "text"),
)
"""Kinds of questions, as scoring knows them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When a run answers questions with the weights it has, and which ones it is asked.

    The ranks of training answer, greedily, as rollout says. Scores go where the losses go, and the
    answers to evaluations/ in the run's folder.
    """

    samples: str = ""
    """File of questions with their truth, in a form of `megatron-keye evaluate`; "": none."""
    task: str = ""
    """Kind of questions that are asked; "": all of the file."""
    interval_steps: int = 0
    """Steps from one evaluation to the next; 0: only after the last step of the run."""
    num_questions: int = 64
    """Most questions, always the first ones of the file; 0: all."""
    max_new_tokens: int = 128
    """Tokens after which an answer is cut."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "training.evaluation",
            above_zero="max_new_tokens",
            zero_or_more="interval_steps num_questions",
        )
        known = ("", *TASKS)
        check(self.task in known, "training.evaluation.task", self.task, f"one of {known}")
        check(
            bool(self.samples) or self.interval_steps == 0,
            "training.evaluation.samples",
            self.samples,
            f"questions, since training.evaluation.interval_steps is {self.interval_steps}",
        )

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Return whether questions are asked after a step.

        Args:
            step: Steps done.
            is_last: Whether no step follows.
        """
        is_at_interval = self.interval_steps > 0 and step % self.interval_steps == 0
        return bool(self.samples) and (is_last or is_at_interval)
