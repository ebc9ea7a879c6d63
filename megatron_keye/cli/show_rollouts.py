# SPDX-License-Identifier: Apache-2.0
"""Shows the best and the worst answers of a run that learns from its own, by kind of question.

    megatron-keye show_rollouts runs/keye_tiny_rl
    megatron-keye show_rollouts runs/keye_tiny_rl --step 40 --count 5 --task grounding

Look here before you look at curves: whether the rewards reward what is meant shows in the answers
that they find best. Without --step it is the newest step.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_keye.cli.arguments import add_count, make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.errors import UserError

_LONGEST = 300
"""Characters of an answer that are shown, from both ends."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye show_rollouts", __doc__)
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest")
    parser.add_argument("--task", metavar="TASK", help="this kind of question alone")
    add_count(parser, "--count", "answers of each sort", default=3)
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Show the answers and return the exit status."""
    options = parse_arguments(arguments)
    path = _file(options.folder, options.step)
    by_task = defaultdict(list)
    for record in _records(path):
        by_task[record["task"]].append(record)
    if options.task is not None and options.task not in by_task:
        raise UserError(f"--task: got {options.task!r}, expected one of {', '.join(by_task)}")
    for task in [options.task] if options.task else sorted(by_task):
        sys.stdout.write(describe(task, by_task[task], options.count))
    return 0


def describe(task: str, records: Sequence[dict[str, Any]], count: int) -> str:
    """Return the best and the worst answers to one kind of question.

    Args:
        task: Kind of question.
        records: Lines of a rollout log.
        count: Answers of each sort.
    """
    scored = [record for record in records if record["reward"] is not None]
    ranked = sorted(scored, key=lambda record: -record["reward"]["total"])
    mean = sum(record["reward"]["total"] for record in scored) / max(1, len(scored))
    num_missing = len(records) - len(scored)
    missing = f", {num_missing} not scored" if num_missing else ""
    lines = [f"{task}: {len(records)} answers, mean reward {mean:.3f}{missing}"]
    worst = ranked[count:][-count:][::-1]
    for title, chosen in (("best", ranked[:count]), ("worst", worst)):
        lines += [f"  {title}"] if chosen else []
        for record in chosen:
            reward = record["reward"]
            lines.append(
                f"    {reward['total']:.3f} (task {reward['task']:.3f}, format "
                f"{reward['format']:.0f})  {record['question']}, answer {record['answer']}, "
                f"{record['num_tokens']} tokens, {record['finish']}"
            )
            lines.append(f"      {_shown(record['text'])}")
    return "\n".join(lines) + "\n"


def _file(folder: Path, step: int | None) -> Path:
    files = {int(path.stem.removeprefix("step-")): path for path in _files(folder)}
    if not files:
        raise UserError(
            f"{folder}: has no rollouts/step-N.jsonl, expected the folder of a run with "
            "post_training.kind"
        )
    if step is not None and step not in files:
        raise UserError(f"--step: got {step}, expected one from {min(files)} to {max(files)}")
    return files[max(files) if step is None else step]


def _files(folder: Path) -> list[Path]:
    return list((folder / "rollouts").glob("step-" + "[0-9]" * 8 + ".jsonl"))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            record["task"], record["reward"], record["text"]
            yield record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a rollout log") from error


def _shown(text: str) -> str:
    """Return an answer in one line, its middle left out if it is long."""
    line = json.dumps(text, ensure_ascii=False)[1:-1]
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
