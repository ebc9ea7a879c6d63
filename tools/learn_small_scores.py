# SPDX-License-Identifier: Apache-2.0
"""Which questions learn_small asks, and what a training run has scored so far, by their kind."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from megatron_keye.observe.curves import StageCurves
from megatron_keye.recipes.keye_small import EVALUATION, HELD_OUT_KIND
from megatron_keye.scoring.intervals import temporal_iou
from megatron_keye.scoring.question import Question
from megatron_keye.scoring.question_file import read_questions
from megatron_keye.scoring.summary import score_questions, summarize
from megatron_keye.scoring.truth import GroundingTruth
from tools.benchmark_lines import fields_of_run, write_line

TAUGHT_KIND = "when"
REWARD = "reward"
SECONDS = (
    *("step_seconds", "data_wait_seconds"),
    *("decoder_seconds", "vision_seconds", "vision_wait_seconds"),
)
"""Of a step's metrics, those that tell what bounds it."""
_NUM_TAUGHT = 64
"""Questions of TAUGHT_KIND that are scored, beside all of HELD_OUT_KIND."""
Scores = dict[str, float]
"""Mean IoU by the kind of questions."""


def choose_questions(clips: Path) -> dict[str, str]:
    """Write the questions that rewards teach, and those that are scored, beside the clips.

    Args:
        clips: What forge_video wrote.

    Returns:
        The kind of each question that is scored, by its id.
    """
    train, held_out = (
        list(_whole_lines(clips / f"{part}.questions.jsonl")) for part in ("train", "held_out")
    )
    taught = [line for line in held_out if line["kind"] == TAUGHT_KIND][:_NUM_TAUGHT]
    scored = [*taught, *(line for line in held_out if line["kind"] == HELD_OUT_KIND)]
    rewarded = [line for line in train if line["kind"] == HELD_OUT_KIND]
    for name, lines in ((f"{HELD_OUT_KIND}.jsonl", rewarded), (Path(EVALUATION).name, scored)):
        (clips / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {line["id"]: line["kind"] for line in scored}


def blind_scores(clips: Path, kinds: Mapping[str, str]) -> dict[str, Scores]:
    """Return by kind what answers score that look at nothing.

    Args:
        clips: What `choose_questions` wrote to.
        kinds: What it returned.

    Returns:
        "whole": the whole video; "constant": the stretch of whole seconds that scores most.
    """
    by_kind: dict[str, list[Question]] = {}
    for question in read_questions(clips / Path(EVALUATION).name):
        by_kind.setdefault(kinds[question.id], []).append(question)
    longest = max(question.seconds or 0.0 for asked in by_kind.values() for question in asked)
    stretches = list(combinations(range(math.ceil(longest) + 1), 2))
    return {
        "whole": {
            kind: summarize(score_questions(asked, {}))[0].blind or 0.0
            for kind, asked in by_kind.items()
        },
        "constant": {
            kind: max(_mean_overlap(each, asked) for each in stretches)
            for kind, asked in by_kind.items()
        },
    }


def _mean_overlap(stretch: tuple[int, int], asked: Sequence[Question]) -> float:
    """Return what a stretch of seconds scores as the answer to all questions."""
    truths = [question.truth for question in asked]
    overlaps = [
        temporal_iou([stretch], truth.intervals, question.seconds)
        for truth, question in zip(truths, asked, strict=True)
        if isinstance(truth, GroundingTruth)
    ]
    return sum(overlaps) / len(asked)


@dataclass(kw_only=True)
class Watched:
    """What a run has written about its scores and rewards, read while it goes on."""

    folder: Path
    """Of the run."""
    kinds: Mapping[str, str]
    """Kind of each question by its id."""
    scores: dict[int, Scores] = field(default_factory=dict)
    """By step."""
    rewards: dict[int, float] = field(default_factory=dict)
    """Mean over the answers of a step."""
    _num_seen: int = 0
    _steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of steps since the last scores."""

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Yield, of each step with something new, its scores or what its rewards were."""
        new = list(_whole_lines(self.folder / "metrics.jsonl"))[self._num_seen :]
        self._num_seen += len(new)
        for line in new:
            step = line["step"]
            if "evaluation" in line:
                self.scores[step] = self._scores_of(step)
                yield {"step": step, "mIoU": self.scores[step], **self._median_seconds()}
            elif policy := line.get("policy"):
                teaching = 1 - policy["num_groups_dropped"] / max(1, policy["num_prompts"])
                self.rewards[step] = policy["reward_task"]
                yield {"step": step, "reward": self.rewards[step], "teaching": teaching}
            elif "step_seconds" in line:
                self._steps.append(line)

    def curves(self) -> StageCurves:
        """Return its scores and rewards, to be drawn."""
        found: dict[str, list[tuple[int, float]]] = {REWARD: sorted(self.rewards.items())}
        for step, scores in sorted(self.scores.items()):
            for kind, score in scores.items():
                found.setdefault(f"{kind} mIoU", []).append((step, score))
        num_steps = max([*self.scores, *self.rewards], default=1)
        return StageCurves(name=self.folder.name, num_steps=num_steps, curves=found)

    def write_lines(self, file: Path) -> None:
        """Append a benchmark's line for each evaluation."""
        recorded = fields_of_run(self.folder)
        for step, scores in sorted(self.scores.items()):
            values = {f"{kind} mIoU": score for kind, score in scores.items()}
            if step in self.rewards:
                values[REWARD] = self.rewards[step]
            line = {"op": "evaluation", "run": self.folder.name, "step": step}
            write_line({**line, **values, **recorded}, file)

    def _median_seconds(self) -> dict[str, float]:
        """Return the median seconds of a step and of what it waits for, since the last scores."""
        steps, self._steps = self._steps, []
        return {
            name: round(median(line[name] for line in steps), 3)
            for name in (SECONDS if steps else ())
        }

    def _scores_of(self, step: int) -> Scores:
        by_kind: dict[str, list[float]] = {}
        for line in _whole_lines(self.folder / "evaluations" / f"step-{step:08}.jsonl"):
            by_kind.setdefault(self.kinds[line["id"]], []).append(line["score"])
        return {kind: sum(values) / len(values) for kind, values in sorted(by_kind.items())}


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that may be written to meanwhile."""
    text = file.read_text() if file.is_file() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
