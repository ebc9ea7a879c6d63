# SPDX-License-Identifier: Apache-2.0
"""The frame of a picture as SVG, which needs no library to write or to show."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH = 1000
"""Pixels of every picture."""


def page(lines: Sequence[str], *, height: int, left: int, title: str) -> str:
    """Return the SVG text of a picture.

    Args:
        lines: Its elements.
        height: In pixels.
        left: Where the title begins.
        title: Text above all.
    """
    opening = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{escape(title)}</text>',
    ]
    return "\n".join([*opening, *lines, "</svg>"]) + "\n"
