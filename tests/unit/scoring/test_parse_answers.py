# SPDX-License-Identifier: Apache-2.0
"""Letters, counts and captions are read as models write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.scoring.parse_choice import parse_choice
from megatron_keye.scoring.parse_count import parse_count
from megatron_keye.scoring.parse_intervals import parse_intervals
from megatron_keye.scoring.token_f1 import token_f1

OPTIONS = ["a red ball", "a blue ball", "a dog", "none of these"]


@pytest.mark.parametrize(
    "text",
    [
        *("B", "b", "(B)", "B.", "**B**", " B) ", "[B]", "B. a blue ball", "(B) the blue one"),
        *("Answer: B", "The answer is (B).", "The best answer is: **B**", "The answer is b"),
        *("Option B is right.", "\\boxed{B}", "\\boxed{\\text{B}}", '{"answer": "B"}'),
        *("B\nBecause it is blue.", "a blue ball", "It is a blue ball.", "I would say B here"),
        *("<think>A or C? A.</think>B", "<answer>B</answer>"),
        *("The answer is not (A). The answer is (B).", "The answer is B, a blue ball."),
        "The answer is B, I think.",
    ],
)
def test_the_letter_is_read(text: str) -> None:
    assert parse_choice(text, OPTIONS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        *("", "E", "A or B", "The answer is A or B.", "B and C", "I do not know", "a red thing"),
        *("a red ball or a dog", "<think>B", "The answer is a cat", '{"answer": "Z"}'),
    ],
)
def test_what_names_no_option_or_several_is_not_understood(text: str) -> None:
    assert parse_choice(text, OPTIONS) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("3", 3), ("three", 3), ("3 times", 3), ("It blinks 3 times.", 3), ("twice", 2)),
        *(("never", 0), ("None", 0), ('{"count": 3}', 3), ("1,234", 1234), ("**3**", 3)),
        *(("The answer is 3.", 3), ("\\boxed{3}", 3), ("3.0", 3), ("A total of 3 shapes", 3)),
        ("From 2.0 s to 8.0 s it blinks 3 times, once per 2 seconds.", 3),
        ("From 2.0 s to 8 s, or 00:02 to 00:08, it blinks 3 times.", 3),
        ("<think>2? 3?</think> 3", 3),
    ],
)
def test_the_number_is_read(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "many", "3.5", "2 or 3", "5 red and 3 blue", "30%", "-3"])
def test_what_is_no_number_or_several_is_not_understood(text: str) -> None:
    assert parse_count(text) is None


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    parse_choice(text, OPTIONS)
    parse_count(text)


@pytest.mark.parametrize("piece", ["1, ", "[", "{[1, ", "1", "1 s and ", "answer ", "*", "A or "])
def test_an_answer_that_repeats_itself_endlessly_is_read_at_once(piece: str) -> None:
    text = f"The answer {piece * 50_000}"
    assert parse_choice(text, OPTIONS) is None and parse_intervals(text) is None
    assert parse_count(text) in (None, 1)


def test_token_f1_by_hand() -> None:
    assert token_f1("A red ball rolls.", "the red ball rolls away") == pytest.approx(6 / 7)
    assert token_f1("red red red", "red") == pytest.approx(2 / 4)
    assert token_f1("", "red") == 0 and token_f1("the", "a") == 1
    chinese = "\u7ea2\u8272\u7684\u7403"
    assert token_f1(chinese[:2], chinese) == pytest.approx(4 / 6)


@given(st.text(), st.text())
def test_token_f1_is_symmetric_and_at_most_1(one: str, other: str) -> None:
    assert token_f1(one, other) == token_f1(other, one) <= 1 == token_f1(one, one)
