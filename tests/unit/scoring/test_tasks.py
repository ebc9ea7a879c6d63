# SPDX-License-Identifier: Apache-2.0
"""Each kind of question: what earns 0, what earns 1, and what lies between."""

import sys
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.errors import UserError
from megatron_keye.scoring.boxes import BoxTruth, parse_boxes
from megatron_keye.scoring.expression import ExpressionTruth
from megatron_keye.scoring.frames import OrderTruth, TimestampTruth
from megatron_keye.scoring.intervals import temporal_iou
from megatron_keye.scoring.scenes import Scene, SceneTruth, parse_scenes
from megatron_keye.scoring.tasks import TRUTHS
from megatron_keye.scoring.token_f1 import token_f1
from megatron_keye.scoring.words import NumberTruth, TextTruth

RAW = {
    "grounding": {"intervals": [[1.0, 2.0]]},
    "choice": {"letter": "B", "options": ["a dog", "a cat"]},
    "count": {"number": 3},
    "caption": {"text": "a ball"},
    "scenes": {"scenes": [{"start": 0.0, "end": 2.0, "caption": "a ball"}]},
    "timestamp": {"time": 3.0, "tolerance": 1.0},
    "order": {"items": ["red ball", "blue cube"]},
    "boxes": {"boxes": [[0.0, 0.0, 4.0, 4.0]]},
    "number": {"number": -2.5, "tolerance": 0.0},
    "expression": {"expression": "\\frac{1}{2}"},
    "text": {"text": "STOP 7"},
}
RIGHT = {
    "grounding": "[[1, 2]]",
    "choice": "B",
    "count": "three times",
    "caption": "A ball.",
    "scenes": '[{"start": 0, "end": 2, "caption": "a ball"}]',
    "timestamp": "At 3.0 seconds.",
    "order": "First the red ball, then the blue cube.",
    "boxes": '[{"bbox_2d": [0, 0, 4, 4]}]',
    "number": "The answer is -2.5.",
    "expression": "So it is $\\frac{2}{4}$.",
    "text": "<answer>stop-7</answer>",
}


@pytest.mark.parametrize("task", TRUTHS)
def test_the_right_answer_earns_1_and_none_earns_0(task: str) -> None:
    truth = TRUTHS[task].read(RAW[task])
    assert TRUTHS[task].read(truth.written()) == truth
    assert truth.score(f"<think>hm</think>{RIGHT[task]}", 10.0).value == 1
    for text in ("", "<think>" + RIGHT[task]):
        score = truth.score(text, 10.0)
        assert score.value == 0 and score.understood is None
    with pytest.raises(UserError, match="expected"):
        TRUTHS[task].read({**RAW[task], "other": 1})


@pytest.mark.parametrize(
    ("text", "value", "is_understood"),
    [("3.5 s", 0.5, True), ("4.5 s", 0, True), ("2 s or 3 s", 0, False), ("00:03", 1, True)],
)
def test_a_timestamp_is_worth_its_closeness(text: str, value: float, is_understood: bool) -> None:
    score = TimestampTruth(time=3.0, tolerance=1.0).score(text, None)
    assert score.value == pytest.approx(value) and (score.understood is not None) == is_understood


def test_an_order_is_right_as_a_whole() -> None:
    truth = OrderTruth(items=("red ball", "blue cube", "cat"))
    for order in permutations(truth.items):
        assert truth.score(", ".join(order), None).value == float(order == truth.items)
    assert truth.score("red ball, blue cube", None).value == 0, "one is left out"
    assert truth.score("red ball, blue cube, red ball, cat", None).value == 0
    with pytest.raises(UserError, match="part of another"):
        OrderTruth.read({"items": ["ball", "red ball"]})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('{"number": 1.5}', 1.5),
        ("it is 2, no, the answer is 1,234.5", 1234.5),
        ("\\boxed{-3}", -3),
        ("3 or 4", None),
        ("about 1e-3", 1e-3),
        ("none", None),
    ],
)
def test_numbers_are_read(text: str, number: float | None) -> None:
    truth = NumberTruth(number=number or 0.0, tolerance=1e-9)
    score = truth.score(text, None)
    assert score.understood == number and score.value == float(number is not None)


def test_a_text_is_the_same_whatever_its_case_and_spaces() -> None:
    truth = TextTruth(text="Caf\u00e9  24/7")
    assert truth.score("CAF\u00c9 24 7!", None).value == 1
    assert truth.score("Cafe 24/7", None).value == 0


def test_scenes_are_read_from_lines_and_json() -> None:
    lines = "<0.0 seconds> to <2.0 seconds>: A ball.\n00:02 - 00:05: A cube - red.\nThe end."
    expected = [
        Scene(interval=(0.0, 2.0), caption="A ball"),
        Scene(interval=(2.0, 5.0), caption="A cube - red"),
    ]
    assert parse_scenes(lines) == expected
    assert parse_scenes('{"scenes": [{"start": 2, "end": 5, "description": "x"}]}') == [
        Scene(interval=(2.0, 5.0), caption="x")
    ]
    assert parse_scenes("A ball comes in.") == []


words = st.sampled_from(["a red ball", "red cube", "blue ball", "green"])
scenes = st.lists(
    st.builds(
        lambda start, size, caption: Scene(interval=(start, start + size), caption=caption),
        st.integers(0, 8).map(float),
        st.integers(1, 4).map(float),
        words,
    ),
    min_size=1,
    max_size=4,
)


@given(scenes, scenes)
@settings(max_examples=60, deadline=None)
def test_scenes_are_matched_in_order_as_well_as_can_be(
    ones: list[Scene], truth: list[Scene]
) -> None:
    ones, truth = (sorted(each, key=lambda s: s.interval) for each in (ones, truth))
    best = max(
        sum(
            temporal_iou([a.interval], [b.interval]) * token_f1(a.caption, b.caption)
            for a, b in zip(left, right, strict=True)
        )
        for size in range(min(len(ones), len(truth)) + 1)
        for left in combinations(ones, size)
        for right in combinations(truth, size)
    )
    text = str([scene.written() for scene in ones]).replace("'", '"')
    score = SceneTruth(scenes=tuple(truth)).score(text, None)
    assert score.value == pytest.approx(2 * best / (len(ones) + len(truth)))


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("[[0, 0, 4, 4], [10, 10, 12, 12]]", 1.0),
        ("[[10, 10, 12, 12], [0, 0, 4, 4]]", 1.0),
        ("[[0, 0, 4, 4]]", (2 / 3 + 1 / 2) / 2),
        ("[[0, 0, 4, 2], [10, 10, 12, 12]]", (1.5 / 2 + 1.5 / 2) / 2),
        ("[[0, 0, 4, 4], [10, 10, 12, 12], [0, 0, 4, 4]]", (4 / 5 + 2 / 3) / 2 - 0.1),
        ("[]", 0.0),
    ],
)
def test_boxes_are_matched_one_to_one(answer: str, value: float) -> None:
    truth = BoxTruth(boxes=((0, 0, 4, 4), (10, 10, 12, 12)))
    assert truth.score(answer, None).value == pytest.approx(value)


def test_nothing_is_there_and_boxes_are_read_or_refused() -> None:
    absent = BoxTruth(boxes=())
    assert absent.score("[]", None).value == 1 and absent.score("[[0, 0, 1, 1]]", None).value == 0
    assert parse_boxes("[0, 0, 1, 1]") == [(0, 0, 1, 1)]
    for text in ("nothing", "[[0, 0, 1]]", "[[2, 0, 1, 1]]", '{"answer": 1}'):
        assert parse_boxes(text) is None
    flood = str([[0, 0, 4, 4]] * 3_000)
    assert BoxTruth(boxes=((0, 0, 4, 4),)).score(flood, None).value == 0
    assert np.isfinite(BoxTruth(boxes=((0, 0, 4, 4),)).score("[[1, 1, 1, 1]]", None).value)


def test_the_page_of_rewards_names_every_task_and_its_truth() -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    for task in TRUTHS:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{task}` |")]
        assert all(f'"{key}"' in line for key in RAW[task]), line


@pytest.mark.parametrize(
    ("right", "answer", "value"),
    [
        ("\\frac{1}{2}", "The answer is 0.5", 1),
        ("2\\sqrt{3}", "$\\sqrt{12}$", 1),
        ("x^2+1", "$1 + x^2$", 1),
        ("x^2+1", "$x^2$", 0),
        ("3", "First 3, then \\boxed{4}.", 0),
        ("3", "$9^{9^{9^{9}}}$", 0),  # Nothing that ends.
    ],
)
def test_an_expression_is_right_in_any_spelling(right: str, answer: str, value: float) -> None:
    score = ExpressionTruth.read({"expression": right}).score(answer, None)
    assert score.value == value and score.understood is not None


def test_an_expression_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"'expression': got '=', expected a number"):
        ExpressionTruth.read({"expression": "="})


def test_expressions_are_refused_by_name_without_their_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"task 'expression': needs math-verify; pip install"):
        ExpressionTruth.read({"expression": "1"})
