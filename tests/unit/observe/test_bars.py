# SPDX-License-Identifier: Apache-2.0
"""Bars are as long as their values, and every group is named."""

import re

from megatron_keye.observe.bars import Group, draw


def test_bars_are_as_long_as_their_values() -> None:
    groups = [
        Group(name="all <1>", values={"mIoU": 0.5, "R1": 1.0}),
        Group(name="short", values={"mIoU": 0.0, "R1": 0.25}),
    ]
    text = draw(groups, "scores & more")
    bars = re.findall(r'<rect x="210" y="\d+" width="(\d+\.\d)"', text)
    widths = [float(width) for width in bars]
    assert [width / widths[1] for width in widths] == [0.5, 1.0, 0.0, 0.25]
    assert "all &lt;1&gt;" in text and "scores &amp; more" in text and ">0.250</text>" in text
