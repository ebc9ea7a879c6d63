# SPDX-License-Identifier: Apache-2.0
"""Every answer of a run with what it was worth: rollouts/step-N.jsonl in the run's folder.

A line is an answer: "step", "question" (file and id), "key" (number of the prompt), "answer",
"task", "text", "finish", "num_tokens", "versions" (weights and the tokens that they drew),
"reward" with its parts, null where it was not scored, "advantage", and where the step learned from
it "ratio" and "clipped". Numbers that are not finite are null.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_keye.post_training.answered import AnsweredGroup
from megatron_keye.post_training.learning import Learned
from megatron_keye.post_training.rollouts import Rollout

_STEP = "step-{:08d}.jsonl"


class RolloutLog:
    """The files of a run; for rank 0."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Make the folder, without the steps that a process which was lost wrote.

        Args:
            folder: Of the run.
            first_step: Steps done.
        """
        self._folder = folder / "rollouts"
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in files_of(folder):
            if _step_of(path) > first_step:
                path.unlink()

    def write(
        self, step: int, rollout: Rollout, learned: Learned, kept: list[AnsweredGroup]
    ) -> None:
        """Write the answers of a step.

        Args:
            step: Steps done, this one included.
            rollout: All answers.
            learned: What was learned.
            kept: The groups that it was learned from, in order.
        """
        numbers = {group.key: number for number, group in enumerate(kept)}
        path = self._folder / _STEP.format(step)
        partial = path.with_suffix(".part")
        with partial.open("w") as file:
            for group in rollout.groups:
                for record in _records(group, numbers.get(group.key), learned):
                    file.write(json.dumps({"step": step} | record, allow_nan=False) + "\n")
        partial.replace(path)


def files_of(folder: Path) -> list[Path]:
    """Return the files of a run's folder, in the order of their steps."""
    return sorted((folder / "rollouts").glob("step-" + "[0-9]" * 8 + ".jsonl"))


def _records(
    group: AnsweredGroup, number: int | None, learned: Learned
) -> Iterator[dict[str, Any]]:
    for completion, text, reward, advantage in zip(
        group.completions, group.texts, group.rewards, group.advantages.tolist(), strict=True
    ):
        ratios = learned.ratios.get((number, completion.answer)) if number is not None else None
        yield {
            "question": group.name,
            "key": group.key,
            "answer": completion.answer,
            "task": group.task,
            "text": text,
            "finish": completion.finish,
            "num_tokens": len(completion.token_ids),
            "versions": [list(run) for run in completion.versions],
            "reward": asdict(reward) if reward is not None else None,
            "advantage": _finite(advantage),
            **({"ratio": _finite(ratios.mean), "clipped": ratios.clipped} if ratios else {}),
        }


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
