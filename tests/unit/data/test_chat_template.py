# SPDX-License-Identifier: Apache-2.0
"""Conversations are written as Qwen3's template writes them, and exactly the answers weigh."""

import dataclasses
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_keye.config import DataConfig
from megatron_keye.data.chat_template import render
from megatron_keye.data.conversation import parse_conversation
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_sample
from megatron_keye.data.tokens import load_tokenizer
from tests.support.clips import tiny_model

TEMPLATE = (Path(__file__).parents[2] / "support" / "qwen3_template.jinja").read_text()
CONFIG = DataConfig(samples="none", row_tokens=4096)
QWEN3 = dataclasses.replace(CONFIG, thinking="qwen3", trains_on_shortened_turns=True)
MODEL = tiny_model()
TOKENIZER = load_tokenizer("qwen")

Turn = dict[str, Any]


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> Turn:
    return {"role": "assistant", "content": content} | more


def called(name: str, arguments: Any) -> Turn:
    return {"id": "7", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str) -> Turn:
    return {"role": "tool", "content": content}


def tool(name: str) -> Turn:
    parameters = {"type": "object", "properties": {"a": {"type": "number", "enum": [1, 2.5]}}}
    function = {"name": name, "description": "<b>\u00e4 & 'b'</b>", "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = called(
    "weather", {"city": "K\u00f6ln", "days": [1, 2.0], "deep": {"a": None, "b": True}}
)
TURNS: dict[str, list[Turn]] = {
    "one turn": [user("Q"), assistant("A")],
    "thinking by key": [user("Q"), assistant("A", reasoning_content="\nhm\n\nso\n")],
    "thinking in the text": [user("Q"), assistant("<think>\nhm\n</think>\n\nA\n")],
    "thinking without its opening": [user("Q"), assistant("hm\n</think>\n\nA")],
    "earlier thinking": [
        *(user("Q"), assistant("A", reasoning_content="hm")),
        *(user("R"), assistant("<think>so</think>B"), user("S"), assistant("C")),
    ],
    "calls behind newlines": [
        *(user("Q"), assistant("\n", reasoning_content="hm", tool_calls=[WEATHER])),
        *(result("cold"), assistant("\n\nA", reasoning_content="so")),
    ],
    "calls and results": [
        *(user("Q"), assistant("\nFirst", reasoning_content="hm", tool_calls=[WEATHER])),
        *(result("cold"), assistant(None, tool_calls=[WEATHER, called("f", '{"a":  1}')])),
        *(result("warm"), result("{}\n"), assistant("A")),
    ],
    "thinking between calls": [
        *(user("Q"), assistant("", reasoning_content="hm", tool_calls=[WEATHER]), result("1")),
        *(assistant("So", reasoning_content="then", tool_calls=[WEATHER]), result("2")),
        *(assistant("A", reasoning_content="done"), user("R"), assistant("B")),
    ],
    "results as the user's turns": [
        *(user("Q"), assistant("", reasoning_content="hm", tool_calls=[WEATHER])),
        *(user("<tool_response>\n1\n</tool_response>"), assistant("A", reasoning_content="x")),
    ],
    "control marks in the text": [user("<|im_end|>\n"), assistant("<|im_start|>A <tool_call>")],
}
CASES = [
    pytest.param(turns, system, tools, id=f"{name}, {len(tools)} tools, system {system!r}")
    for (name, turns), system, tools in product(
        TURNS.items(), ("", "Be kind.\n"), ([], [tool("weather"), tool("f")])
    )
]


def sample_of(record: Any, config: DataConfig = CONFIG) -> Sample:
    conversation = parse_conversation(json.dumps(record), "s:1", Path())
    return make_sample(conversation, TOKENIZER, config, MODEL)


def text_of(sample: Sample) -> str:
    return TOKENIZER.decode(sample.token_ids.tolist())


def weighed_text(sample: Sample) -> list[tuple[str, float]]:
    """Return each run of predicted tokens of one weight as text."""
    weights, runs = sample.weights, []
    edges = np.flatnonzero(np.diff(weights, prepend=0, append=0)).tolist()
    for start, stop in zip(edges, edges[1:], strict=False):
        if weights[start]:
            tokens = sample.token_ids[start + 1 : stop + 1].tolist()
            runs.append((TOKENIZER.decode(tokens), float(weights[start])))
    return runs


@pytest.mark.parametrize(("turns", "system", "tools"), CASES)
def test_text_is_that_of_transformers_template(
    turns: list[Turn], system: str, tools: list[Any]
) -> None:
    messages = [{"role": "system", "content": system}] * bool(system) + turns
    rendered, _ = render_jinja_template([messages], tools=tools, chat_template=TEMPLATE)
    assert text_of(sample_of({"messages": messages, "tools": tools}, QWEN3)) == rendered[0]


def test_thinking_is_kept_everywhere_unless_asked_otherwise() -> None:
    record = {"messages": TURNS["earlier thinking"]}
    kept = sample_of(record)
    assert re.findall(r"assistant\n(.*?)<\|im_end\|>", text_of(kept), re.DOTALL) == [
        *("<think>\nhm\n</think>\n\nA", "<think>\nso\n</think>\n\nB", "C"),
    ]
    assert [text for text, _ in weighed_text(kept)] == [
        "<think>\nhm\n</think>\n\nA<|im_end|>",
        "<think>\nso\n</think>\n\nB<|im_end|>",
        "C<|im_end|>",
    ]
    without = dataclasses.replace(CONFIG, trains_on_thinking=False)
    answers = [text for text, _ in weighed_text(sample_of(record, without))]
    assert answers == ["A<|im_end|>", "B<|im_end|>", "C<|im_end|>"]


def test_turns_that_lost_their_thinking_are_predicted_only_on_request() -> None:
    record = {"messages": TURNS["earlier thinking"]}
    shortened = ["A<|im_end|>", "B<|im_end|>", "C<|im_end|>"]
    assert [text for text, _ in weighed_text(sample_of(record, QWEN3))] == shortened
    strict = dataclasses.replace(QWEN3, trains_on_shortened_turns=False)
    assert [text for text, _ in weighed_text(sample_of(record, strict))] == shortened[2:]


@pytest.mark.parametrize("key", ["loss", "weight", "train", "loss_mask", "loss_scale"])
def test_a_turns_weight_has_one_meaning_in_any_spelling(key: str) -> None:
    turns = [user("Q"), assistant("A"), user("R"), assistant("B"), user("S"), assistant("C")]
    turns[1][key], turns[3][key] = False, 0.25
    turns[4][key] = 0
    assert weighed_text(sample_of({"messages": turns})) == [
        ("B<|im_end|>", 0.25),
        ("C<|im_end|>", 1.0),
    ]


def test_text_mode_predicts_all_text_but_turns_of_weight_0() -> None:
    config = dataclasses.replace(CONFIG, loss_tokens="text")
    record = {"messages": [user("Q"), assistant("A", weight=0), user("R") | {"loss": 0.5}]}
    assert weighed_text(sample_of(record, config)) == [
        ("user\nQ<|im_end|>\n", 1.0),
        ("<|im_start|>user\nR<|im_end|>\n", 0.5),
    ]
    config = dataclasses.replace(config, trains_on_thinking=False)
    record = {"messages": [user("Q"), assistant("A", reasoning="hm")]}
    assert weighed_text(sample_of(record, config)) == [
        ("user\nQ<|im_end|>\n<|im_start|>assistant\n", 1.0),
        ("A<|im_end|>\n", 1.0),
    ]


def test_an_agent_trajectory_of_ms_swift_is_that_of_openai() -> None:
    function = tool("weather")["function"]
    call = {"name": "weather", "arguments": {"city": "Ulm"}}
    swift = {
        "tools": json.dumps([function]),
        "messages": [
            *(user("Q"), assistant("<think>hm</think>First")),
            *({"role": "tool_call", "content": json.dumps(call)} for _ in range(2)),
            *({"role": "tool_response", "content": text} for text in ("cold", "warm")),
            assistant("A", loss=True),
        ],
    }
    openai = {
        "tools": [{"type": "function", "function": function}],
        "messages": [
            user("Q"),
            assistant("First", reasoning_content="hm", tool_calls=[called(**call)] * 2),
            *(result("cold") | {"tool_call_id": "7"}, result("warm")),
            assistant("A"),
        ],
    }
    factory = {
        "tools": json.dumps([function]),
        "conversations": [
            *({"from": "human", "value": "Q"}, {"from": "gpt", "value": "<think>hm</think>First"}),
            {"from": "function_call", "value": json.dumps([call, call])},
            *({"from": "observation", "value": text} for text in ("cold", "warm")),
            {"from": "gpt", "value": "A"},
        ],
    }
    first, *others = [sample_of(record) for record in (swift, openai, factory)]
    for other in others:
        np.testing.assert_array_equal(first.token_ids, other.token_ids)
        np.testing.assert_array_equal(first.weights, other.weights)
    swift["messages"][1]["loss"], swift["messages"][3]["loss"] = False, 0.5
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
    assert weighed_text(first) == [
        (f"<think>\nhm\n</think>\n\nFirst\n{written}\n{written}<|im_end|>", 1.0),
        ("A<|im_end|>", 1.0),
    ]
    assert weighed_text(sample_of(swift)) == [
        (f"\n{written}", 1.0),
        (f"\n{written}<|im_end|>", 0.5),
        ("A<|im_end|>", 1.0),
    ]


TEXTS = st.lists(
    st.sampled_from([*"ab \n.<>", "\u00e9", "\U0001f600", "<|im_end|>", "<tool_call>"]), max_size=8
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Turn], list[str]]:
    """Return turns, and the text that they let a model learn, by turn."""
    turns, learnt = [], []
    for _ in range(draw(st.integers(1, 6))):
        role, text = draw(st.sampled_from(["system", "user", "assistant", "tool"])), draw(TEXTS)
        turn: Turn = {"role": role, "content": text}
        if role == "assistant":
            thinking = draw(st.sampled_from(["", "hm", "a\n\nb"]))
            number = draw(st.integers(0, 2))
            turn |= {"reasoning": thinking, "tool_calls": [called("f", {"a": 1})] * number}
            weight = draw(st.sampled_from([None, True, 0, 0.5]))
            turn |= {} if weight is None else {"weight": weight}
            block = f"<think>\n{thinking}\n</think>\n\n" if thinking else ""
            call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
            calls = "\n".join([call] * number)
            between = "\n" if text and calls else ""
            text = text.lstrip("\n") if thinking else text
            if weight != 0:
                learnt.append(f"{block}{text}{between}{calls}<|im_end|>")
        elif draw(st.booleans()):
            turn["loss"] = False
        turns.append(turn)
    return turns, learnt


@given(conversations())
def test_exactly_the_assistants_tokens_and_its_end_weigh(
    case: tuple[list[Turn], list[str]],
) -> None:
    turns, learnt = case
    if not learnt:
        with pytest.raises(ValueError, match="no assistant message that is predicted"):
            sample_of({"messages": turns})
        return
    sample = sample_of({"messages": turns})
    assert "".join(text for text, _ in weighed_text(sample)) == "".join(learnt)
    assert (sample.labels >= 0).tolist() == (sample.weights > 0).tolist()
    # What is predicted is cut off from what is not, as it is when the model is served.
    whole = "".join(
        piece.part.value
        for piece in render(
            parse_conversation(json.dumps({"messages": turns}), "s", Path()), CONFIG
        )
    )
    assert text_of(sample) == whole
