# SPDX-License-Identifier: Apache-2.0
"""Stretches of time are read in all forms that models write, and nothing else is."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.scoring.parse_intervals import parse_intervals


@pytest.mark.parametrize(
    ("text", "intervals"),
    [
        ("12.5s - 14s", [(12.5, 14)]),
        ("00:12 to 00:14", [(12, 14)]),
        ("<12.5 seconds> to <14.0 seconds>", [(12.5, 14)]),
        ("[[12.5, 14.0], [20, 21]]", [(12.5, 14), (20, 21)]),
        ("[12.5, 14.0]", [(12.5, 14)]),
        ("(12.5, 14.0)", [(12.5, 14)]),
        ('{"start": "00:12", "end": "1:02:03.5"}', [(12, 3723.5)]),
        ('```json\n[{"start_time": 1, "end_time": 2.5}]\n```', [(1, 2.5)]),
        ('{"intervals": [[1, 2]], "confidence": 0.9}', [(1, 2)]),
        ('{"answer": "from 3 s to 4 s"}', [(3, 4)]),
        ('["0:05 - 0:07", "0:09-0:10"]', [(5, 7), (9, 10)]),
        ("[1, 3] and [5, 7]", [(1, 3), (5, 7)]),
        ("1 - 3 s, 5 - 7 s and 9-10 s", [(1, 3), (5, 7), (9, 10)]),
        ("The event happens between 1 min and 80 s.", [(60, 80)]),
        ("from 1 minute 5 seconds until 1 hour, 2 minutes and 3 seconds", [(65, 3723)]),
        ("1 - 2 min", [(60, 120)]),
        ("It starts at 3 seconds and ends at about 5 seconds.", [(3, 5)]),
        ("Start: 3.0, end: 5.0", [(3, 5)]),
        ("00:00:01,500 --> 00:00:02,250", [(1.5, 2.25)]),
        ("12.5\u201314 s", [(12.5, 14)]),
        ("In 2 to 3 words: it is at 10.0s to 12.0s.", [(10, 12)]),
        ("from the beginning to 3 s", [(0, 3)]),
        ("from 3 s on", [(3, math.inf)]),
        ("<3.0 seconds> to the end of the video", [(3, math.inf)]),
        ("<think>maybe 1 s to 2 s</think>3 s to 4 s", [(3, 4)]),
        ("1 s to 2 s? <answer>[3, 4]</answer>", [(3, 4)]),
        ("[]", []),
        ("It never appears.", []),
        ("The red circle does not appear in the video.", []),
    ],
)
def test_forms(text: str, intervals: list[tuple[float, float]]) -> None:
    assert parse_intervals(text) == intervals


@pytest.mark.parametrize(
    "text",
    [
        *("", "I see a red circle.", "At 2.0 seconds.", "5 s to 3 s", "[3, 1]", "3 s and 5 s"),
        *("<think>3 s to 4 s", "[NaN, 3]", "[1e999, 2]", "[[1, 2], [3]]", "50% - 60%"),
        *("[true, 2]", '{"start": 1}', "[" * 5000, "the end to the end"),
    ],
)
def test_what_is_no_stretch_is_not_understood(text: str) -> None:
    assert parse_intervals(text) is None


@given(
    st.lists(
        st.tuples(st.integers(0, 10**5), st.integers(0, 10**5)).map(lambda p: sorted(p)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["{}s - {}s", "<{} seconds> to <{} seconds>", "[{}, {}]", "from {} to {}"]),
)
def test_what_is_written_is_read(tenths: list[list[int]], form: str) -> None:
    intervals = [(start / 10, end / 10) for start, end in tenths]
    text = ", ".join(form.format(*interval) for interval in intervals)
    assert parse_intervals(text) == intervals


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    parse_intervals(text)
