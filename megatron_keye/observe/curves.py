# SPDX-License-Identifier: Apache-2.0
"""Draws metrics of several runs that follow each other as one SVG: a panel per metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from megatron_keye.observe.svg import WIDTH, page

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Steps, from 1, and values of each metric of a run."""

_LEFT, _TOP, _PANEL, _GAP = 80, 60, 150, 26
"""Pixels."""
_MOST_POINTS = 400
"""Of a curve in one stage; more would lie closer than pixels."""


@dataclass(frozen=True, kw_only=True)
class StageCurves:
    """One run of several."""

    name: str
    """Text above it."""
    num_steps: int
    """Steps of the whole run."""
    curves: Curves
    """Its metrics, as far as it has them."""


def draw(stages: Sequence[StageCurves], metrics: Sequence[str], title: str) -> str:
    """Return the SVG text; all runs are equally wide, whatever their number of steps.

    Args:
        stages: The runs in order.
        metrics: Names of the metrics to draw, from top to bottom.
        title: Text above all.
    """
    width = (WIDTH - _LEFT - 10) / len(stages)
    height = _TOP + len(metrics) * (_PANEL + _GAP) + 10
    lines: list[str] = []
    for index, stage in enumerate(stages):
        x = _LEFT + (index + 0.5) * width
        lines.append(f'<text x="{x:.1f}" y="40" text-anchor="middle">{escape(stage.name)}</text>')
        steps = f"{stage.num_steps:,} steps"
        lines.append(f'<text x="{x:.1f}" y="54" text-anchor="middle" fill="#777">{steps}</text>')
    for index, metric in enumerate(metrics):
        lines += _panel(stages, metric, _TOP + index * (_PANEL + _GAP), width)
    return page(lines, height=height, left=_LEFT, title=title)


def _panel(stages: Sequence[StageCurves], metric: str, top: int, width: float) -> list[str]:
    """Return one metric over all runs, between its smallest and its largest value."""
    values = [value for stage in stages for _, value in stage.curves.get(metric, ())]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = _PANEL / ((high - low) or 1.0)

    def height(value: float) -> float:
        return top + (high - value) * scale

    lines = [f'<text x="8" y="{top + _PANEL / 2:.0f}">{escape(metric)}</text>']
    for value in (low, high) if values else ():
        place = f'x="{_LEFT - 4}" y="{height(value) + 4:.1f}" text-anchor="end"'
        lines.append(f"<text {place}>{value:.4g}</text>")
    for index, stage in enumerate(stages):
        left = _LEFT + index * width
        lines.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_PANEL}" '
            f'fill="{"#f4f4f4" if index % 2 else "white"}" stroke="#ccc"/>'
        )
        curve = stage.curves.get(metric, ())
        every = -(-len(curve) // _MOST_POINTS) or 1
        points = " ".join(
            f"{left + (step - 0.5) / stage.num_steps * width:.1f},{height(value):.1f}"
            for step, value in curve[::every]
        )
        if points:
            lines.append(f'<polyline points="{points}" fill="none" stroke="#1d3f66"/>')
    return lines
