# SPDX-License-Identifier: Apache-2.0
"""Pictures of a profile as SVG elements, whose colours the page's style gives."""

from collections.abc import Mapping, Sequence
from html import escape

from megatron_keye.profiling.units import duration, percent, size

WIDTH = 960
"""Pixels of every picture."""
_LEFT, _BAR, _GAP, _AXIS = 90, 22, 8, 22


def legend(colours: Mapping[str, str]) -> str:
    """Return a legend: names with their colours."""
    items = [f'<span><i style="background:{c}"></i>{escape(n)}</span>' for n, c in colours.items()]
    return f'<div class="legend">{"".join(items)}</div>'


def bar(parts: Sequence[tuple[str, float, str]], *, width: int, whole: float) -> str:
    """Return one bar of parts beside each other.

    Args:
        parts: Text, value and colour of each.
        width: Pixels of the value `whole`.
        whole: Value that fills the width.
    """
    x, drawn = 0.0, []
    for text, value, colour in parts:
        length = value / whole * width if whole else 0.0
        drawn.append(
            f'<rect x="{x:.1f}" width="{length:.1f}" height="12" style="fill:{colour}">'
            f"<title>{escape(text)}</title></rect>"
        )
        x += length
    return f'<svg width="{width}" height="12">{"".join(drawn)}</svg>'


def stacked_bars(
    rows: Mapping[str, Sequence[tuple[str, float]]], colours: Mapping[str, str]
) -> str:
    """Return a bar for each row, from 0 to 100 % of a step.

    Args:
        rows: By label: the shares by name, in order.
        colours: By name.
    """
    scale = WIDTH - _LEFT - 20
    widest = max(1.0, *(sum(share for _, share in parts) for parts in rows.values()))
    height = len(rows) * (_BAR + _GAP) + _AXIS
    drawn = []
    for index, (label, parts) in enumerate(rows.items()):
        y, x = index * (_BAR + _GAP), float(_LEFT)
        drawn.append(f'<text x="0" y="{y + 15}">{escape(label)}</text>')
        for name, share in parts:
            length = share / widest * scale
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{_BAR}" '
                f'style="fill:{colours[name]}"><title>{escape(name)}: {percent(share)}</title>'
                "</rect>"
            )
            x += length
    for mark in range(0, int(widest * 100) + 1, 20):
        x = _LEFT + mark / 100 / widest * scale
        drawn.append(_axis_text(x, height - 6, f"{mark} %"))
    return _svg(drawn, height)


def stacked_areas(
    seconds: Sequence[float],
    layers: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
) -> str:
    """Return bytes over time, kinds on top of each other.

    Args:
        seconds: Times, ascending.
        layers: By kind from the bottom, the bytes at each time.
        colours: By kind.
    """
    plot, top, scale_x = 220, 8, WIDTH - _LEFT - 20
    totals = [sum(values) for values in zip(*layers.values(), strict=True)]
    highest, end = max(totals, default=0.0) or 1.0, seconds[-1] if seconds else 1.0

    def place(second: float, value: float) -> str:
        x = _LEFT + second / end * scale_x
        return f"{x:.1f},{top + plot - value / highest * plot:.1f}"

    drawn = [
        f'<line x1="{_LEFT}" x2="{WIDTH - 20}" y1="{top + plot * (1 - share):.1f}" '
        f'y2="{top + plot * (1 - share):.1f}" style="stroke:var(--line)"/>'
        f'<text x="{_LEFT - 8}" y="{top + plot * (1 - share) + 4:.1f}" text-anchor="end" '
        f'class="quiet">{size(highest * share)}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    below = [0.0] * len(seconds)
    for name, values in layers.items():
        above = [low + value for low, value in zip(below, values, strict=True)]
        forth = [place(at, value) for at, value in zip(seconds, above, strict=True)]
        back = [place(at, value) for at, value in zip(seconds, below, strict=True)][::-1]
        drawn.append(
            f'<polygon points="{" ".join([*forth, *back])}" style="fill:{colours[name]}">'
            f"<title>{escape(name)}: {size(max(values))} at most</title></polygon>"
        )
        below = above
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawn.append(_axis_text(_LEFT + share * scale_x, top + plot + 18, duration(end * share)))
    return _svg(drawn, top + plot + _AXIS + 4)


def _axis_text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" class="quiet">{text}</text>'


def _svg(drawn: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-size="12">{"".join(drawn)}</svg>'
    )
