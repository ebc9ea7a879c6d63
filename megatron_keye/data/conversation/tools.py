# SPDX-License-Identifier: Apache-2.0
"""Tools that a conversation may call, and calls, in OpenAI's spelling and in ms-swift's.

Both become the JSON text that Qwen3's template writes.
"""

import json
from collections.abc import Mapping
from typing import Any

from megatron_keye.data.conversation.keys import unread_keys
from megatron_keye.data.conversation.values import shown, text
from megatron_keye.errors import UserError


def read_tools(raw: Any) -> tuple[str, ...]:
    """Read the tools of a record.

    Args:
        raw: A list of tools, or JSON of one. A tool is {"type": "function", "function": {...}},
            or the function alone, which is put into that form; or JSON of either.

    Returns:
        JSON of each.

    Raises:
        UserError: Saying what was got and expected.
    """
    tools = _from_json(raw, "'tools'")
    if not isinstance(tools, list):
        raise UserError(f"'tools': got {shown(tools)}, expected a list of tools, or JSON of one")
    return tuple(_tool(_from_json(tool, "a tool")) for tool in tools)


def _tool(raw: Any) -> str:
    is_wrapped = isinstance(raw, dict) and "function" in raw
    function = raw["function"] if is_wrapped else raw
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"got tool {shown(raw)}, expected an object with the name of a function")
    kind = raw.get("type", "function") if is_wrapped else "function"
    if kind != "function":
        raise UserError(f"got a tool of type {shown(kind)}, expected 'function'")
    return to_json(raw if is_wrapped else {"type": "function", "function": raw})


def read_calls(raw: Any, unread: set[str]) -> tuple[str, ...]:
    """Read the calls of a turn.

    Args:
        raw: A call or a list of calls, or JSON of either. A call is an object of "name" and
            "arguments", or has one at "function"; arguments are an object, or JSON of one.
        unread: Receives keys that nothing reads.

    Returns:
        A JSON object of "name" and "arguments" for each; arguments that were text stay as they
        are written.

    Raises:
        UserError: Saying what was got and expected.
    """
    calls = _from_json(raw, "'tool_calls'")
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise UserError(f"'tool_calls': got {shown(calls)}, expected calls, or JSON of them")
    return tuple(_call(_from_json(call, "a call"), unread) for call in calls)


def _call(raw: Any, unread: set[str]) -> str:
    function = raw.get("function") if isinstance(raw, dict) else None
    is_wrapped = isinstance(function, dict)
    call: Any = function if is_wrapped else raw
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f"got call {shown(raw)}, expected an object of 'name' and 'arguments'")
    if raw.get("type") not in (None, "function"):
        raise UserError(f"got a call of type {shown(raw['type'])}, expected 'function'")
    read = {"name", "arguments"}
    unread |= unread_keys(call, read if is_wrapped else read | {"type"}, "tool_calls.")
    unread |= unread_keys(raw, {"type", "function"}, "tool_calls.") if is_wrapped else set()
    return f'{{"name": "{call["name"]}", "arguments": {_arguments(call)}}}'


def _arguments(call: Mapping[str, Any]) -> str:
    given = call.get("arguments")
    written = "{}" if given is None else given if isinstance(given, str) else to_json(given)
    if not isinstance(_from_json(written, "'arguments'"), dict):
        raise UserError(f"'arguments': got {shown(given)}, expected an object, or JSON of one")
    return written


def _from_json(value: Any, name: str) -> Any:
    """Return what JSON text holds, and anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(text(value, name))
    except ValueError as error:
        raise UserError(f"{name}: got {shown(value)}, expected JSON ({error})") from error


def to_json(value: Any) -> str:
    """Return JSON as transformers' chat templates write it.

    Raises:
        UserError: For NaN and infinity, which JSON has not.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"got {shown(value)}, expected what JSON can hold ({error})") from error
