# SPDX-License-Identifier: Apache-2.0
"""What an answer is worth to training: by its task and by its form.

    total = g (task_weight x task + format_weight x format)

where g is 0 for an answer that could not be understood, and else 1. The task's part is the score
of `scoring`, by which `megatron-keye evaluate` measures too, so that a model is trained on what is
measured; grounding pays for stretches beyond those that could be meant. A judge, where there is
one, takes the rule's place for tasks of free text.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.post_training.judge import judge
from megatron_keye.rollout.request import Finish
from megatron_keye.scoring.final_answer import final_answer
from megatron_keye.scoring.question import Question
from megatron_keye.scoring.truth import GroundingTruth

_SPAM_COST = 0.1
"""What each stretch beyond twice those of the truth and two more costs."""
_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The parts of one answer's reward, ready for JSON."""

    total: float
    """0 to the sum of both weights."""
    task: float
    """0 to 1: what the answer is worth by its task."""
    format: float
    """0 or 1: whether its form is right."""
    is_understood: bool
    """Whether it could be read; without, all is 0."""
    judge: Literal["none", "asked", "kept"] = "none"
    """Whether a judge gave the task's part, now or earlier."""


def reward(question: Question, text: str, finish: Finish, settings: PostTrainingConfig) -> Reward:
    """Return what an answer is worth.

    Args:
        question: What was asked, and what is right.
        text: The answer, with its thinking.
        finish: How it ended.
        settings: Weights of the parts, whether there must be thinking, and who judges.

    Raises:
        UserError: When the judge fails, so that the answer is not scored.
    """
    score = question.truth.score(text, question.seconds)
    task = score.value
    if isinstance(question.truth, GroundingTruth) and score.understood is not None:
        num_allowed = 2 * len(question.truth.intervals) + 2
        task = max(0.0, task - _SPAM_COST * max(0, len(score.understood) - num_allowed))
    judged: Literal["none", "asked", "kept"] = "none"
    if settings.judge.judges(question.task) and score.understood is not None:
        judgement = judge(question, final_answer(text) or "", settings.judge)
        task, judged = judgement.value, "kept" if judgement.was_kept else "asked"
    form = has_form(text, finish, requires_thinking=settings.requires_thinking)
    is_understood = score.understood is not None
    total = settings.task_weight * task + settings.format_weight * form
    return Reward(
        total=total if is_understood else 0.0,
        task=task if is_understood else 0.0,
        format=float(form and is_understood),
        is_understood=is_understood,
        judge=judged,
    )


def has_form(text: str, finish: Finish, *, requires_thinking: bool) -> bool:
    """Return whether an answer ended by itself, its thinking, if any, in one block before it.

    Args:
        text: The answer, with its thinking.
        finish: How it ended.
        requires_thinking: Whether there must be thinking.
    """
    block = _THINKING.match(text)
    rest = text[block.end() :] if block else text
    is_outside = "<think>" not in rest and "</think>" not in rest
    return finish == "stop" and is_outside and (block is not None or not requires_thinking)
