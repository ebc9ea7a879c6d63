# SPDX-License-Identifier: Apache-2.0
"""Means over many answers, and over those about videos of like length."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_keye.scoring.answers import Answer
from megatron_keye.scoring.question import Question
from megatron_keye.scoring.truth import Score

LENGTH_BOUNDS = (15.0, 60.0, 180.0, 600.0, 1800.0)
"""Seconds between classes of lengths, the upper bound left out."""
ALL_LENGTHS = "all"
_UNKNOWN = "unknown length"


@dataclass(frozen=True, kw_only=True)
class ScoredQuestion:
    """A question with the scores of its answers."""

    question: Question
    """The question."""
    answers: tuple[Answer, ...]
    """Its answers; none if the model gave none, which counts as a score of 0."""
    scores: tuple[Score, ...]
    """One for each answer."""

    @property
    def measures(self) -> tuple[float, ...]:
        """What it adds to each metric of its task: the mean over its answers."""
        terms = [self.question.truth.measures(score.value) for score in self.scores]
        columns = zip(*terms or [self.question.truth.measures(0.0)], strict=True)
        return tuple(sum(column) / max(1, len(terms)) for column in columns)

    def written(self) -> list[dict[str, Any]]:
        """Return a line for each answer: what was written, understood, right, and its score."""
        common = {"id": self.question.id, "truth": self.question.truth.written()}
        return [
            common | {"text": answer.text, "understood": score.understood, "score": score.value}
            for answer, score in zip(self.answers, self.scores, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a set of questions came to."""

    length: str
    """Class of lengths of the videos, or "all"."""
    num_questions: int
    """Questions, answered or not."""
    num_answers: int
    """Answers to them."""
    num_unanswered: int
    """Questions without an answer, which score 0."""
    num_not_understood: int
    """Answers that could not be read, which score 0."""
    num_cut: int
    """Answers that end at the limit of tokens."""
    metrics: Mapping[str, float]
    """Means over questions, by name."""
    blind: float | None
    """What the first of them is for answers that look at nothing: the whole video, or letters that
    are drawn; None where that is not known of every question."""


def score_questions(
    questions: Iterable[Question], answers: Mapping[str, Sequence[Answer]]
) -> list[ScoredQuestion]:
    """Score the answers to each question.

    Args:
        questions: In any order.
        answers: By the id of their question.
    """
    scored = []
    for question in questions:
        given = tuple(answers.get(question.id, ()))
        scores = tuple(question.truth.score(each.text, question.seconds) for each in given)
        scored.append(ScoredQuestion(question=question, answers=given, scores=scores))
    return scored


def summarize(
    scored: Sequence[ScoredQuestion], bounds: Sequence[float] = LENGTH_BOUNDS
) -> list[Summary]:
    """Return the summary of all questions, then one for each class of lengths that has any.

    Args:
        scored: Questions of one task, at least one.
        bounds: Seconds between classes, ascending.
    """
    by_length: dict[tuple[float, str], list[ScoredQuestion]] = {}
    for each in scored:
        by_length.setdefault(length_class(each.question, bounds), []).append(each)
    classes = [_summary(key[1], by_length[key]) for key in sorted(by_length)]
    return [_summary(ALL_LENGTHS, scored), *classes]


def length_class(question: Question, bounds: Sequence[float]) -> tuple[float, str]:
    """Return where the class of a question's video stands among all, and its name."""
    if question.seconds is None:
        return math.inf, question.length or _UNKNOWN
    above = [bound for bound in bounds if bound <= question.seconds]
    below = [bound for bound in bounds if bound > question.seconds]
    low = above[-1] if above else 0.0
    return low, f"{low:g} to {below[0]:g} s" if below else f"{low:g} s and more"


def _summary(label: str, scored: Sequence[ScoredQuestion]) -> Summary:
    columns = zip(*(each.measures for each in scored), strict=True)
    names = scored[0].question.truth.metrics
    scores = [score for each in scored for score in each.scores]
    blind = [each.question.truth.blind_score(each.question.seconds) for each in scored]
    known = [score for score in blind if score is not None]
    return Summary(
        length=label,
        num_questions=len(scored),
        num_answers=len(scores),
        num_unanswered=sum(not each.answers for each in scored),
        num_not_understood=sum(score.understood is None for score in scores),
        num_cut=sum(answer.is_cut for each in scored for answer in each.answers),
        metrics={
            name: math.fsum(column) / len(scored)
            for name, column in zip(names, columns, strict=True)
        },
        blind=math.fsum(known) / len(known) if len(known) == len(blind) else None,
    )
