# SPDX-License-Identifier: Apache-2.0
"""Draws values from 0 to 1 of several groups as one SVG of bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from megatron_keye.observe.svg import WIDTH, page

_LEFT, _TOP, _BAR, _GAP, _RIGHT = 210, 58, 14, 16, 60
"""Pixels."""
_COLOURS = ("#1d3f66", "#4f7cac", "#2a9d8f", "#e9c46a", "#8d5a97")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Bars that belong together."""

    name: str
    """Text beside them."""
    values: Mapping[str, float]
    """From 0 to 1, by the names of the bars; the same names in all groups."""


def draw(groups: Sequence[Group], title: str) -> str:
    """Return the SVG text: groups from top to bottom, one colour for each name.

    Args:
        groups: At least one, with at most five values each.
        title: Text above all.
    """
    names = list(groups[0].values)
    scale = WIDTH - _LEFT - _RIGHT
    group_height = len(names) * _BAR + _GAP
    height = _TOP + len(groups) * group_height + 10
    lines = [
        f'<line x1="{_LEFT + share * scale:.1f}" x2="{_LEFT + share * scale:.1f}" y1="{_TOP - 6}" '
        f'y2="{height - 16}" stroke="#ddd"/>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    for place, name in enumerate(names):
        x = _LEFT + place * 150
        lines.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{_COLOURS[place]}"/>')
        lines.append(f'<text x="{x + 18}" y="45">{escape(name)}</text>')
    for index, group in enumerate(groups):
        top = _TOP + index * group_height
        middle = top + len(names) * _BAR / 2 + 4
        lines.append(f'<text x="8" y="{middle:.0f}">{escape(group.name)}</text>')
        for place, name in enumerate(names):
            value, y = group.values[name], top + place * _BAR
            lines.append(
                f'<rect x="{_LEFT}" y="{y}" width="{value * scale:.1f}" height="{_BAR - 2}" '
                f'fill="{_COLOURS[place]}"/>'
            )
            lines.append(
                f'<text x="{_LEFT + value * scale + 4:.1f}" y="{y + 11}">{value:.3f}</text>'
            )
    return page(lines, height=height, left=8, title=title)
