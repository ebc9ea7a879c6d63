# SPDX-License-Identifier: Apache-2.0
"""Draws the held-out losses of several runs over their steps, one line a run, one panel a source.

    python -m tools.draw_validation --out needles.svg \\
        "with warm-up=runs/needle_sparse" "without=runs/needle_sparse_cold"

--lines FILE appends a JSON line for each validation: its losses, commit, versions and command.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config.data import ALL_SOURCES
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing
from megatron_keye.observe.svg import WIDTH, page
from tools.benchmark_lines import fields_of_run, metrics_of_run, write_line

Points = Sequence[tuple[int, float]]
"""Steps done, and the loss then in nats a token."""

_LEFT, _TOP, _PANEL, _GAP = 80, 60, 180, 30
"""Pixels."""
_COLOURS = ("#1d3f66", "#c04a1a", "#3a7d34", "#7a3f8f")


@dataclass(frozen=True, kw_only=True)
class NamedRun:
    """A run with its held-out losses."""

    name: str
    """Text at its line."""
    folder: Path
    """The run's folder."""
    losses: Mapping[str, Points]
    """By source, in the order of steps."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.draw_validation", __doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a name and a run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="SVG to write")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="file to append JSON lines to")
    parser.add_argument("--title", default="held-out loss, nats a token", help="text above all")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Draw the picture, append the lines and return the exit status."""
    options = parse_arguments(arguments)
    if len(options.runs) > len(_COLOURS):
        raise UserError(
            f"NAME=RUN: got {len(options.runs)}, expected at most {len(_COLOURS)} runs"
        )
    runs = [read_run(words) for words in options.runs]
    lines = [line for run in runs for line in described(run)] if options.lines else []
    with writing(options.out, "the picture"):
        options.out.write_text(draw(runs, options.title))
    if options.lines:
        with writing(options.lines, "JSON lines"):
            for line in lines:
                write_line(line, options.lines)
    return 0


def read_run(words: str) -> NamedRun:
    """Read NAME=RUN.

    Raises:
        UserError: When it has no name, or the run has no held-out losses.
    """
    name, _, folder = words.partition("=")
    if not (name and folder):
        raise UserError(f"NAME=RUN: got {words!r}, expected a name, =, and the folder of a run")
    losses = read_losses(metrics_of_run(Path(folder)))
    if not losses:
        raise UserError(
            f"{folder}/metrics.jsonl: has no held-out losses, expected those of data.validation"
        )
    return NamedRun(name=name, folder=Path(folder), losses=losses)


def read_losses(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the held-out losses in the lines of a metrics.jsonl by source, without their mean."""
    by_source: dict[str, dict[int, float]] = {}
    for line in lines:
        for source, figures in line.get("validation", {}).items():
            # A loss that is not finite is null; a resumed run computes some again.
            if source != ALL_SOURCES and figures["loss"] is not None:
                by_source.setdefault(source, {})[line["step"]] = figures["loss"]
    return {source: sorted(losses.items()) for source, losses in by_source.items()}


def described(run: NamedRun) -> list[dict[str, Any]]:
    """Return a line for each validation of a run, with what its last start recorded.

    Raises:
        UserError: When the run has no such record.
    """
    recorded = fields_of_run(run.folder)
    steps = sorted({step for points in run.losses.values() for step, _ in points})
    by_source = {source: dict(points) for source, points in run.losses.items()}
    return [
        {
            "op": "validation",
            "run": run.name,
            "step": step,
            **{name: round(at[step], 4) for name, at in by_source.items() if step in at},
            **recorded,
        }
        for step in steps
    ]


def draw(runs: Sequence[NamedRun], title: str) -> str:
    """Return the SVG text; each panel begins at a loss of 0."""
    sources = list(dict.fromkeys(source for run in runs for source in run.losses))
    lines = []
    for index, run in enumerate(runs):
        x = _LEFT + index * 200
        lines.append(f'<rect x="{x}" y="37" width="24" height="4" fill="{_COLOURS[index]}"/>')
        lines.append(f'<text x="{x + 30}" y="43">{escape(run.name)}</text>')
    last = max(step for run in runs for points in run.losses.values() for step, _ in points)
    for index, source in enumerate(sources):
        lines += _panel(runs, source, top=_TOP + index * (_PANEL + _GAP), last_step=last)
    height = _TOP + len(sources) * (_PANEL + _GAP) + 10
    return page(lines, height=height, left=_LEFT, title=title)


def _panel(runs: Sequence[NamedRun], source: str, *, top: int, last_step: int) -> list[str]:
    """Return the losses of one source, with their largest value and the last step."""
    curves = [run.losses.get(source, ()) for run in runs]
    high = max(loss for points in curves for _, loss in points) or 1.0
    width, bottom = WIDTH - _LEFT - 20, top + _PANEL
    right = _LEFT + width
    lines = [
        f'<text x="8" y="{top + _PANEL / 2:.0f}">{escape(source)}</text>',
        f'<rect x="{_LEFT}" y="{top}" width="{width}" height="{_PANEL}" fill="#f4f4f4"/>',
        f'<text x="{_LEFT - 4}" y="{top + 4}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{_LEFT - 4}" y="{bottom + 4}" text-anchor="end">0</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{last_step:,} steps</text>',
    ]
    for points, colour in zip(curves, _COLOURS, strict=False):
        places = " ".join(
            f"{_LEFT + step / last_step * width:.1f},{bottom - loss / high * _PANEL:.1f}"
            for step, loss in points
        )
        lines.append(
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
