# SPDX-License-Identifier: Apache-2.0
"""A rank that works longer than its peers is named; waits and other roles do not count."""

import pytest

from megatron_keye.observe.span import Span, SpanName
from megatron_keye.observe.stragglers import WORK, compare, work_seconds


def spans(**seconds: float) -> list[Span]:
    names: dict[str, SpanName] = {"encode": "encode", "forward": "forward", "wait": "wait"}
    return [Span(name=names[n], label="", start=1.0, end=1.0 + s) for n, s in seconds.items()]


def table(*ranks: dict[str, float]) -> list[list[float]]:
    return [work_seconds(spans(**seconds), data_wait=0.1) for seconds in ranks]


ROLES = ["decoder stage 0"] * 3 + ["decoder stage 1", "vision", "vision"]


def test_the_slow_rank_and_its_work_are_named_against_peers_of_its_role() -> None:
    seconds = table(
        *[{"forward": 1.0, "wait": 9.0}, {"forward": 1.0}, {"forward": 1.1}],
        *[{"forward": 50.0}, {"encode": 2.0}, {"encode": 6.0}],
    )
    first, *others = compare(seconds, ROLES, step_seconds=10.0)
    assert (first.rank, first.role, first.work, first.is_notable) == (5, "vision", "encode", True)
    assert str(first) == (
        "rank 5 (vision) is slow: encode took 6 s, 3.0 times the 2 s of its peers"
    )
    forward = next(slowest for slowest in others if slowest.work == "forward")
    assert (forward.rank, forward.ratio) == (2, pytest.approx(1.1))
    assert not any(slowest.is_notable for slowest in others), "a stage of one rank has no peers"


def test_what_is_a_small_part_of_the_step_is_not_notable() -> None:
    (slowest, *_) = compare(
        table({"encode": 0.1}, {"encode": 0.4}), ["vision"] * 2, step_seconds=8
    )
    assert slowest.ratio == pytest.approx(4) and not slowest.is_notable


def test_work_is_summed_in_the_order_of_its_names() -> None:
    two = [*spans(encode=1.0), *spans(encode=0.5, wait=3.0)]
    assert work_seconds(two, data_wait=0.2) == [0.2, 0.0, 1.5, 0.0, 0.0, 0.0]
    assert WORK[:3] == ("data_wait", "decode", "encode")
