# SPDX-License-Identifier: Apache-2.0
"""One turn of a record becomes a message: who speaks, content, thinking, calls, weight."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_keye.data.conversation.content import MediaLists, read_content
from megatron_keye.data.conversation.keys import REFUSED_IN_MESSAGE, refuse_keys, unread_keys
from megatron_keye.data.conversation.media import LIST_KEYS
from megatron_keye.data.conversation.tools import read_calls, to_json
from megatron_keye.data.conversation.turns import Message, Part, Role, ToolCall
from megatron_keye.data.conversation.values import is_given, number, one_of, shown, text
from megatron_keye.errors import UserError

_ROLES: dict[str, Role] = {
    **{"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"},
    # ShareGPT, LLaMA-Factory
    **{"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"},
    # ms-swift, OpenAI of old
    **{"tool_call": "assistant", "tool_response": "tool", "function": "tool"},
}
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose content is calls, and which go on with the assistant's turn before them."""
_CALL_KEYS = ("tool_calls", "function_call")
_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_KEYS = ("loss", "weight", "train", "loss_mask", "loss_scale")
_READ = {
    *("role", "from", "content", "value", *_CALL_KEYS),
    *(*_THINKING_KEYS, *_WEIGHT_KEYS, *LIST_KEYS["image"], *LIST_KEYS["video"]),
}
_END = "</think>"


def read_message(raw: Any, media: MediaLists, unread: set[str]) -> Message:
    """Read one turn.

    Args:
        raw: An object with "role" and "content", or "from" and "value".
        media: The record's files, for markers; files of the turn itself come before them.
        unread: Receives keys that nothing reads.

    Raises:
        UserError: Saying what was got and expected.
    """
    given_role = one_of(raw, ("role", "from"), text) if isinstance(raw, dict) else None
    if given_role is None:
        raise UserError(f"got message {shown(raw)}, expected an object with 'role' and 'content'")
    if given_role not in _ROLES:
        raise UserError(f"got role {given_role!r}, expected one of {', '.join(_ROLES)}")
    refuse_keys(raw, REFUSED_IN_MESSAGE)
    unread |= unread_keys(raw, _READ, "messages.")
    role = _ROLES[given_role]
    calls = one_of(raw, _CALL_KEYS, lambda value, _: _calls(value, unread)) or ()
    content = one_of(raw, ("content", "value"), lambda value, _: value)
    if content is None and not calls:
        raise UserError(
            f"got message {shown(raw)}, expected 'role' and 'content', got content None"
        )
    if given_role in _CALL_ROLES:
        # Markers in it are part of the JSON.
        written = content if isinstance(content, str) else to_json(content)
        content = [{"type": "text", "text": written}]
    parts = _content("" if content is None else content, raw, media)
    weight = one_of(raw, _WEIGHT_KEYS, _weight)
    message = Message(
        role=role,
        parts=tuple(parts),
        weight=weight,
        tool_calls=tuple(ToolCall(value=call, weight=weight) for call in calls),
    )
    thinking = one_of(raw, _THINKING_KEYS, text) or ""
    if role != "assistant":
        if thinking or calls:
            raise UserError(
                f"got thinking or calls in a turn of {given_role!r}, expected them "
                "in the assistant's"
            )
        return message
    message = _with_thinking(message, thinking)
    return _as_calls(message, unread) if given_role in _CALL_ROLES else message


def _content(content: Any, raw: Mapping[str, Any], media: MediaLists) -> list[Part]:
    """Read the content of a turn, whose own files come before those of the record."""
    own = MediaLists.of(raw, media.limits)
    both = MediaLists(
        waiting={**media.waiting, **own.waiting},
        limits=media.limits,
        shown_kinds=media.shown_kinds,
    )
    parts = read_content(content, both)
    own.check_empty()
    return parts


def _calls(value: Any, unread: set[str]) -> tuple[str, ...]:
    return read_calls(value, unread) if is_given(value) else ()


def joins(before: Message, raw: Mapping[str, Any]) -> bool:
    """Return whether a turn of calls goes on with the turn before it."""
    role = raw.get("role") or raw.get("from")
    return role in _CALL_ROLES and before.role == "assistant"


def joined(before: Message, calls: Message) -> Message:
    """Return an assistant's turn with the calls of a turn of their own behind it.

    Raises:
        UserError: When the calls have thinking of their own.
    """
    if before.thinking and calls.thinking:
        raise UserError("thinks again between an assistant's text and its calls, expected once")
    return replace(
        before,
        thinking=before.thinking or calls.thinking,
        tool_calls=before.tool_calls + calls.tool_calls,
    )


def _as_calls(message: Message, unread: set[str]) -> Message:
    """Return a turn whose text is calls in JSON."""
    content = "".join(part.value for part in message.parts)
    calls = (ToolCall(value=c, weight=message.weight) for c in read_calls(content, unread))
    return replace(message, parts=(), tool_calls=(*calls, *message.tool_calls))


def _weight(value: Any, key: str) -> float:
    """Read what a turn weighs; true and false are 1 and 0."""
    if isinstance(value, bool):
        return float(value)
    return number(value, key, "true, false or a weight of 0 or more", least=0)


def _with_thinking(message: Message, thinking: str) -> Message:
    """Return the message with its thinking apart, whether it has a key of its own or <think>.

    As Qwen3's template takes it out of the text, which drops what stands before <think>, and all
    but the last part of a text with several </think>; both are refused here.
    """
    parts = message.parts
    marked = next((n for n, p in enumerate(parts) if p.kind == "text" and _END in p.value), None)
    if marked is None:
        return replace(message, thinking=thinking.strip("\n"))
    if thinking:
        raise UserError(f"has thinking in a key of its own and {_END} in its text, expected one")
    before, _, answer = parts[marked].value.partition(_END)
    ahead, _, inside = before.rpartition("<think>")
    if marked or ahead.strip() or _END in answer or any(_END in p.value for p in parts[1:]):
        raise UserError(
            f"got {shown(parts[marked].value)}, expected thinking once, at the start of the turn"
        )
    answer = answer.lstrip("\n")
    rest: tuple[Part, ...] = (replace(parts[0], value=answer),) if answer else ()
    return replace(message, parts=(*rest, *parts[1:]), thinking=inside.strip("\n"))
