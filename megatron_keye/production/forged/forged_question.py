# SPDX-License-Identifier: Apache-2.0
"""A question about a forged clip, and how it is made from what the clip shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_keye.production.forged.scene import Frames, Scene
from megatron_keye.scoring.intervals import Interval
from megatron_keye.scoring.parse_choice import LETTERS
from megatron_keye.scoring.question import choice_text
from megatron_keye.scoring.truth import ChoiceTruth, GroundingTruth, Task, Truth


@dataclass(frozen=True, kw_only=True)
class ForgedQuestion:
    """A question, and how it is answered."""

    kind: str
    """Of `questions.KINDS`."""
    task: Task
    """Of `scoring.tasks.TRUTHS`."""
    text: str
    """The question."""
    answer: str
    """What a model should say."""
    truth: Truth
    """What its answer is compared with."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A scene as the file that was written of it shows it."""

    scene: Scene
    """What is shown."""
    times: Sequence[float]
    """When each frame is shown, in seconds."""
    seconds: float
    """When the last one ends."""

    def interval(self, frames: Frames) -> Interval:
        """Return a stretch of frames in seconds; a frame stays until the next one comes."""
        bounds = [*self.times, self.seconds]
        return round(bounds[frames[0]], 3), round(bounds[frames[1]], 3)


def written_intervals(intervals: Sequence[Interval]) -> str:
    """Write stretches with times as a model sees them beside the frames."""
    written = [f"<{start:.1f} seconds> to <{end:.1f} seconds>" for start, end in intervals]
    return ", ".join(written) if written else "Never."


def grounding(kind: str, text: str, intervals: Sequence[Interval]) -> ForgedQuestion:
    """Return a question of when, with the stretches that answer it; none for never."""
    return ForgedQuestion(
        kind=kind,
        task="grounding",
        text=text,
        answer=written_intervals(intervals),
        truth=GroundingTruth(intervals=tuple(intervals)),
    )


def choice(
    kind: str, text: str, right: str, options: Sequence[str], draw: np.random.Generator
) -> ForgedQuestion:
    """Return a multiple-choice question.

    Args:
        kind: Of `questions.KINDS`.
        text: The question without its options.
        right: The right one of the options.
        options: Which are shuffled.
        draw: Shuffles.
    """
    shuffled = [options[place] for place in draw.permutation(len(options))]
    letter = LETTERS[shuffled.index(right)]
    return ForgedQuestion(
        kind=kind,
        task="choice",
        text=choice_text(text, shuffled),
        answer=letter,
        truth=ChoiceTruth(letter=letter, options=tuple(shuffled)),
    )
