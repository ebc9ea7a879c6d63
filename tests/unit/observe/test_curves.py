# SPDX-License-Identifier: Apache-2.0
"""The picture of several runs: valid, inside its panels, each run as wide as the others."""

import xml.etree.ElementTree as ElementTree

import pytest

from megatron_keye.observe.curves import StageCurves, draw

SVG = "{http://www.w3.org/2000/svg}"


def points_of(text: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(text).iter(f"{SVG}polyline")
    points = (line.attrib["points"].split() for line in lines)
    return [[tuple(map(float, p.split(","))) for p in each] for each in points]  # type: ignore[misc]


def test_runs_are_equally_wide_and_share_the_scale_of_a_metric() -> None:
    long = [(step, 1.0 / step) for step in range(1, 2001)]
    stages = [
        StageCurves(name="a & b", num_steps=2000, curves={"loss": long, "KL": []}),
        StageCurves(
            name="c", num_steps=2, curves={"loss": [(1, 1.0), (2, 0.0)], "KL": [(2, 5.0)]}
        ),
    ]
    first, second, kl = points_of(draw(stages, ["loss", "KL"], title="<all>"))
    assert len(first) == 400 and len(second) == 2 and len(kl) == 1
    width = 2 * (second[1][0] - second[0][0])
    assert width == pytest.approx((1000 - 80 - 10) / 2, abs=0.5)
    assert first[0][0] < 81 and first[-1][0] < 80 + width < second[0][0]
    top, bottom = first[0][1], second[1][1]
    assert first[0][1] == second[0][1] and bottom - top == 150
    assert all(top <= y <= bottom for _, y in first)


def test_a_run_that_has_not_begun_has_an_empty_panel() -> None:
    stage = StageCurves(name="a", num_steps=3, curves={})
    assert points_of(draw([stage], ["loss"], title="")) == []
