# SPDX-License-Identifier: Apache-2.0
"""Records of every usual form mean one thing; what would be ignored is refused or counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.data.conversation import Conversation, describe_unread, parse_conversation
from megatron_keye.data.video.limits import MediaLimits
from megatron_keye.errors import UserError

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


def parsed(record: Any) -> Conversation:
    return parse_conversation(json.dumps(record), "s:1", Path())


def shown(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m.role, "".join(part.value for part in m.parts)) for m in conversation.messages]


def of_user(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **more}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "system", "content": "S"}, USER, ANSWER]},
        {"system": "S", "messages": [USER, ANSWER], "history": None, "tools": "", "images": []},
        {"system": "S", "query": "Q", "response": "A", "history": []},
        {"system": "S", "instruction": "Q", "input": "", "output": "A"},
        {"system": "S", "conversations": [USER, {"from": "gpt", "value": "A"}]},
        {"messages": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, ANSWER]},
    ],
)
def test_all_forms_are_one_conversation(record: Any) -> None:
    conversation = parsed(record)
    assert shown(conversation) == [("system", "S"), ("user", "Q"), ("assistant", "A")]
    assert not conversation.unread and not conversation.tools


def test_characters_in_two_halves_are_one() -> None:
    (question, _) = parsed({"query": "\U0001f600", "response": "A"}).messages
    assert question.parts[0].value == "\U0001f600"


def test_history_and_input_are_turns_and_lines() -> None:
    earlier = [["1", "2"], ["3", "4"]]
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    last = [("user", "Q\nX"), ("assistant", "A")]
    query = {"query": "Q\nX", "response": "A", "history": earlier}
    alpaca = {"instruction": "Q", "input": "X", "output": "A", "history": earlier}
    assert shown(parsed(query)) == shown(parsed(alpaca)) == turns + last


def test_media_of_a_turn_come_before_those_of_the_record() -> None:
    turns = [
        {"role": "user", "content": "<image>a<video>", "images": ["own.png"]},
        {"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "<image>"}]},
        ANSWER,
    ]
    record = {"messages": turns, "images": [{"path": "r.png"}], "videos": ["v.mp4"]}
    assert shown(parsed(record))[:2] == [("user", "own.pngav.mp4"), ("tool", "r.png<image>")]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "image", "image": "file:///a%20b.png"}, "/a b.png"),
        ({"type": "image", "image": "FILE://localhost/a.png"}, "/a.png"),
        ({"type": "image", "image": "HTTP://a/b.png"}, "HTTP://a/b.png"),
        ({"type": "image", "image": "s3://b/" + "k" * 3000}, "s3://b/" + "k" * 3000),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}, "a.png"),
        ({"type": "video_url", "video_url": {"url": "v.mp4"}}, "v.mp4"),
        ({"type": "video", "path": "v.mp4", "text": None}, "v.mp4"),
        ({"type": "image", "image": "package://p/a.png"}, "package://p/a.png"),
    ],
)
def test_media_are_named_in_any_usual_way(part: Any, name: str) -> None:
    assert parsed(of_user(part)).messages[0].parts[0].value == name


def test_limits_of_a_part_come_before_those_of_the_record() -> None:
    video = {"type": "video", "video": "v.mp4"}
    own = video | {"nframes": 8, "max_pixels": 784.0}
    record = of_user(video, own, {"type": "image", "image": "i.png"}, fps=0.5)
    record["mm_processor_kwargs"] = {"max_pixels": 7840}
    limits = [part.limits for part in parsed(record).messages[0].parts]
    assert limits == [
        MediaLimits(fps=0.5, max_pixels=7840),
        MediaLimits(nframes=8, max_pixels=784),
        MediaLimits(max_pixels=7840),
    ]


def test_a_list_of_frames_has_the_rate_it_was_taken_at() -> None:
    frames = ["1.png", "file:///2.png"]
    by_fps = parsed(of_user({"type": "video", "video": frames, "fps": 4})).messages[0].parts[0]
    assert by_fps.frame_names == ("1.png", "/2.png") and by_fps.frame_list_rate == 4
    assert by_fps.limits == MediaLimits()
    record = {"messages": [USER | {"content": "<video>"}, ANSWER], "videos": [frames]}
    part = parsed(record | {"sample_fps": 4, "fps": 1}).messages[0].parts[0]
    assert (part.frame_list_rate, part.limits.fps) == (4, 1)


def test_what_is_not_read_is_counted_by_name() -> None:
    turns = [USER | {"name": "me", "content": "<|box_start|>"}, ANSWER | {"id": 3, "x": None}]
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}, "index": 0}'}
    record = {"messages": [*turns, call], "id": 0, "source": "web", "fps": 2, "meta": {}}
    conversation = parsed(record)
    assert conversation.unread == (
        *("<|box_start|>", "fps", "id", "messages.id", "messages.name", "source"),
        "tool_calls.index",
    )
    marks = parsed(record | {"grounding_tokens": True})
    assert marks.has_grounding_tokens and "<|box_start|>" not in marks.unread
    assert describe_unread({"id": 1, "source": 1200, "<|box_start|>": 2}) == (
        "keys that were not read: source (1,200), id (1); marks that stay plain text: "
        "<|box_start|> (2); 'grounding_tokens': true in a record writes those of grounding as "
        "tokens"
    )


def test_tools_of_any_spelling_are_functions() -> None:
    function = {"name": "f", "description": "\u00e9", "parameters": {}}
    wrapped = {"type": "function", "function": function}
    expected = (json.dumps(wrapped, ensure_ascii=False),)
    for tools in ([wrapped], [function], [json.dumps(function)], json.dumps([wrapped])):
        assert parsed({"messages": [USER, ANSWER], "tools": tools}).tools == expected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"label": False}, "'label': False, which is preference data"),
        ({"chosen": "A"}, "preference data"),
        ({"rejected": ANSWER}, "preference data"),
        ({"rejected_response": "A"}, "preference data"),
        ({"audios": ["a.wav"]}, "audio encoder"),
        ({"objects": {"bbox": []}}, "write boxes and names out"),
        ({"loss": False}, "would weigh the whole record"),
        ({"loss_mask": [0, 1]}, "would weigh the whole record"),
        ({"input_ids": [1]}, "already tokenized"),
        ({"functions": [{"name": "f"}]}, "old form of 'tools'"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "data.thinking"),
        ({"image": "a.png", "images": ["b.png"]}, "'images'.*'image'.*mean the same and differ"),
        ({"image_path": "a.png"}, "names 1 more than"),
        ({"imgs": "a.png"}, "'imgs'.*list of file names"),
        ({"query": "Q", "response": "A"}, "turns at 'messages' and at 'query'"),
        ({"system": "S", "messages": [{"role": "system", "content": ""}, ANSWER]}, "one of them"),
        ({"fps": "2"}, "'fps': got '2', expected a rate above 0"),
        (
            {"fps": 1, "nframes": 3, "videos": ["v"], "messages": [USER | {"content": "<video>"}]},
            "either decides",
        ),
        ({"mm_processor_kwargs": {"do_resize": False}}, "has 'do_resize', expected some of"),
        ({"mm_processor_kwargs": {"fps": 1}, "fps": 2}, "expected one of them"),
        ({"grounding_tokens": "yes"}, "expected true or false"),
        ({"tools": [{"function": {"x": 1}}]}, "the name of a function"),
        ({"tools": "[{"}, "'tools': got .*, expected JSON"),
        ({"tools": [{"type": "web_search", "function": {"name": "f"}}]}, "expected 'function'"),
        ({"tools": [{"name": "f", "x": float("nan")}]}, "what JSON can hold"),
    ],
)
def test_what_carries_meaning_is_never_dropped(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"s:1: .*{words}"):
        parsed({"messages": [USER, ANSWER]} | more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"loss": True, "weight": 0}, "mean the same and differ"),
        ({"weight": -1}, "weight of 0 or more"),
        ({"loss_scale": [0, 1]}, "weight of 0 or more"),
        ({"weight": float("nan")}, "weight of 0 or more"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "'arguments': got .*expected JSON"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "expected an object, or JSON of one"),
        ({"tool_calls": [{"arguments": {}}]}, "'name' and 'arguments'"),
        ({"tool_calls": [{"name": "f", "type": "code"}]}, "expected 'function'"),
        ({"tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}, "differ"),
        ({"reasoning": "a", "thinking": "b"}, "mean the same and differ"),
        ({"content": "<think>a</think>b", "reasoning": "a"}, "expected one"),
        ({"content": "x<think>a</think>b"}, "thinking once, at the start"),
        ({"content": "<think>a</think>b</think>c"}, "thinking once, at the start"),
        ({"role": "tool", "reasoning": "a"}, "turn of 'tool', expected them in the assistant's"),
        ({"role": "user", "from": "gpt"}, "differ"),
        ({"role": "tool_call"}, "expected JSON"),
        ({"role": "tool_call", "content": '{"name": "f"}', "images": ["i"]}, "names 1 more than"),
        ({"refusal": "No."}, "'refusal'"),
        ({"prefix": True}, "'prefix'"),
        ({"train_detail": [1]}, "'train_detail'"),
        ({"images": ["a.png"]}, "names 1 more than"),
    ],
)
def test_turns_that_would_be_misread_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"s:1: message 2: .*{words}"):
        parsed({"messages": [USER, ANSWER | more]})


def test_calls_in_a_turn_of_their_own_have_their_own_weight() -> None:
    call = {"role": "tool_call", "content": '{"name": "f"}', "reasoning": "hm"}
    turns = [USER, ANSWER | {"loss": 0}, call, call | {"loss": 0.5, "reasoning": None}]
    answer = parsed({"messages": turns}).messages[1]
    assert (answer.weight, [c.weight for c in answer.tool_calls]) == (0, [None, 0.5])
    assert answer.thinking == "hm"
    with pytest.raises(ValueError, match="message 4: thinks again"):
        parsed({"messages": [*turns[:3], call]})


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video", "video": "v", "start": float("nan")}, "'start': got nan, .*seconds"),
        ({"type": "video", "video": "v", "end": 10**400}, "'end': got 1000.*seconds as a number"),
        ({"type": "video", "video": "v", "end": float("inf")}, "'end': got inf"),
        ({"type": "video", "video": "v", "nframes": 0}, "whole number above 0"),
        ({"type": "video", "video": "v", "min_frames": 9, "max_frames": 8}, "at most the second"),
        ({"type": "video", "video": "v", "nframes": 4, "max_frames": 8}, "either decides"),
        ({"type": "video", "video": "v", "path": "w"}, "expected one of them"),
        ({"type": "video", "video": ["a.png", 3]}, "list of file names"),
        ({"type": "video", "video": "v", "resized_height": 28}, "unknown 'resized_height'"),
        ({"type": "image", "image": "i", "fps": 1}, "unknown 'fps'"),
        ({"type": "image", "image": {"bytes": "abc", "path": "i"}}, "bytes of a file"),
        ({"type": "image", "image": "iVBORw0KGgo" * 99}, "at most 255 bytes between slashes"),
        ({"type": "image", "image": "a\0b"}, "no file name"),
        ({"type": "image", "image": "a/" * 2000}, "2048 in all"),
        ({"type": "image", "image": "file://host/b.png"}, "on the machine 'host'"),
        ({"type": "image", "image": "data:image/png;base64,AAAA"}, "holds a file instead of its"),
        ({"type": "image", "image": f"DATA:image/png;base64,{'iVBORw0K' * 500}"}, "to a file and"),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}, "list of file names"),
        ({"type": "image"}, "expected text at 'image'"),
        ({"type": "text"}, "expected text"),
    ],
)
def test_media_that_would_be_misread_are_refused(part: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^s:1: message 1: .*{words}") as raised:
        parsed(of_user(part))
    assert len(str(raised.value)) < 500, "the message prints the data"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": ' + "[" * 100_000, "nested too deeply"),
        ('{"messages": [{"role": "user", "content": ' + "9" * 5000 + "}]}", "not valid JSON"),
        (b'{"messages": "\xff"}', "is not UTF-8"),
        (r'{"query": "\ud83d", "response": "A"}', "has half of a character"),
        ("{oops", r"is not valid JSON .*one object per line"),
        ("3", "got int"),
    ],
)
def test_lines_that_are_no_records_are_sentences(line: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^s:1: .*{words}"):
        parse_conversation(line, "s:1", Path())


KEYS = [
    *("messages", "conversations", "query", "response", "history", "instruction", "output"),
    *("role", "from", "content", "value", "tools", "tool_calls", "function", "name", "arguments"),
    *("type", "text", "image", "video", "image_url", "url", "images", "videos", "fps", "nframes"),
    *("max_pixels", "start", "loss", "weight", "reasoning", "system", "mm_processor_kwargs"),
]
WORDS = [
    *("system", "user", "assistant", "tool", "tool_call", "text", "image", "video", "image_url"),
    *("function", "a.png", "<image>", "<think>", "</think>a", "[]", "{", "\ud800", "file://"),
]
LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(WORDS),
            "content": VALUES,
            "tool_calls": VALUES,
            "images": VALUES,
            "loss": LEAVES,
            "reasoning": LEAVES,
        },
    ),
    max_size=3,
)


@given(
    VALUES | st.fixed_dictionaries({"messages": TURNS}, optional=dict.fromkeys(KEYS[1:], VALUES))
)
def test_any_record_is_a_conversation_or_a_sentence(record: Any) -> None:
    try:
        conversation = parsed(record)
    except UserError as error:
        assert str(error).startswith("s:1: ") and len(str(error)) < 1000
    else:
        assert conversation.messages
