# SPDX-License-Identifier: Apache-2.0
"""Draws a step as an SVG Gantt chart: one bar per rank, one colour per kind of span."""

from xml.sax.saxutils import escape

from megatron_keye.observe.span import Span, SpanName
from megatron_keye.observe.svg import WIDTH, page

_COLOURS: dict[SpanName, str] = {
    "decode": "#b0b0b0",
    "encode": "#2a9d8f",
    "send": "#e9c46a",
    "wait": "#f4f4f4",
    "forward": "#4f7cac",
    "backward": "#1d3f66",
    "return": "#e9c46a",
    "vision": "#14665c",
    "optimizer": "#8d5a97",
}
_LEFT, _BAR, _GAP, _TOP = 70, 22, 8, 34
"""Pixels."""
_DRAWN_LAST: tuple[SpanName, ...] = ("wait", "send", "return")
"""Short, or nested in other spans."""


def draw(spans: dict[int, list[Span]], title: str) -> str:
    """Return the SVG text.

    Args:
        spans: Spans of each rank.
        title: Text above the bars.
    """
    end = max((s.end for rank_spans in spans.values() for s in rank_spans), default=0.0) or 1.0
    scale = (WIDTH - _LEFT - 10) / end
    height = _TOP + len(spans) * (_BAR + _GAP) + 46
    lines: list[str] = []
    for index, (rank, rank_spans) in enumerate(sorted(spans.items())):
        y = _TOP + index * (_BAR + _GAP)
        lines.append(f'<text x="8" y="{y + 15}">rank {rank}</text>')
        for span in sorted(rank_spans, key=lambda s: (s.name in _DRAWN_LAST, s.start)):
            lines.append(_bar(span, y, scale))
    lines += _axis(_TOP + len(spans) * (_BAR + _GAP), end, scale)
    return page(lines, height=height, left=_LEFT, title=title)


def _bar(span: Span, y: int, scale: float) -> str:
    x, width = _LEFT + span.start * scale, max(0.3, (span.end - span.start) * scale)
    milliseconds = (span.end - span.start) * 1000
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" '
        f'fill="{_COLOURS[span.name]}" stroke="white" stroke-width="0.3">'
        f"<title>{span.name} {escape(span.label)}: {milliseconds:.1f} ms</title></rect>"
    )


def _axis(y: int, end: float, scale: float) -> list[str]:
    """Return the time axis and the legend, below the bars."""
    lines = [
        f'<text x="{_LEFT + end * share * scale:.0f}" y="{y + 12}" text-anchor="{anchor}">'
        f"{end * share:.3g} s</text>"
        for share, anchor in zip((0, 0.25, 0.5, 0.75, 1), [*["middle"] * 4, "end"], strict=True)
    ]
    for index, (name, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + index * 95
        lines.append(
            f'<rect x="{x}" y="{y + 24}" width="12" height="12" fill="{colour}" stroke="#999"/>'
            f'<text x="{x + 16}" y="{y + 34}">{name}</text>'
        )
    return lines
