# SPDX-License-Identifier: Apache-2.0
"""Draws how a run's scores rose while it trained, from its metrics.jsonl.

    python -m tools.draw_scores runs/keye_tiny_grounding --out scores.svg

One panel for the loss of training, one for each metric of training.evaluation, and where a run
learns from its own answers, one for their mean reward and one for the share of prompts whose
answers differ in it, so that they teach. --lines FILE appends a JSON line for each evaluation:
these values at its step, commit, versions and command.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing
from megatron_keye.observe.curves import StageCurves, draw
from tools.benchmark_lines import fields_of_run, metrics_of_run, write_line

_LOSS = "loss"
_POLICY = ("reward", "share of prompts that teach")
"""Of a run that learns from its own answers, at each step."""
Points = dict[str, list[tuple[int, float]]]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.draw_scores", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="SVG to write")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="file to append JSON lines to")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Draw the picture and return the exit status."""
    options = parse_arguments(arguments)
    curves = read_curves(metrics_of_run(options.run))
    scores = [name for name in curves if name not in (_LOSS, *_POLICY)]
    if not scores:
        raise UserError(
            f"{options.run}/metrics.jsonl: has no scores, expected those of "
            "training.evaluation.samples"
        )
    steps = max(step for points in curves.values() for step, _ in points)
    stage = StageCurves(name=scores[0].partition(" ")[0], num_steps=steps, curves=curves)
    shown = [*scores, *(name for name in _POLICY if name in curves)]
    picture = draw([stage], [_LOSS, *shown], f"{options.run.name}: answers while it trains")
    with writing(options.out, "the picture"):
        options.out.write_text(picture)
    if options.lines:
        recorded = fields_of_run(options.run)
        by_name = {name: dict(curves[name]) for name in shown}
        with writing(options.lines, "JSON lines"):
            for step in sorted({step for name in scores for step in by_name[name]}):
                values = {name: at[step] for name, at in by_name.items() if step in at}
                write_line({"op": "evaluation", "step": step, **values, **recorded}, options.lines)
    return 0


def read_curves(lines: Iterable[Mapping[str, Any]]) -> Points:
    """Return the points of the loss, of each task's metrics, and of _POLICY, by name."""
    curves: Points = {}
    for line in lines:
        found = {_LOSS: line["loss"]} if "loss" in line else {}
        if policy := line.get("policy"):
            teaching = 1 - policy["num_groups_dropped"] / max(1, policy["num_prompts"])
            found |= dict(zip(_POLICY, (policy["reward_task"], teaching), strict=True))
        for task, scores in line.get("evaluation", {}).items():
            found |= {f"{task} {name}": value for name, value in scores.items()}
        for name, value in found.items():
            # A loss that is not finite is null.
            if value is not None:
                curves.setdefault(name, []).append((line["step"], value))
    return curves


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
