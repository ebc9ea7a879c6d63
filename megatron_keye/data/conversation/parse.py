# SPDX-License-Identifier: Apache-2.0
"""Reads one record of a sample file into a conversation."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_keye.data.conversation.content import MediaLists
from megatron_keye.data.conversation.forms import read_turns
from megatron_keye.data.conversation.keys import (
    REFUSED_IN_RECORD,
    plain_marks,
    refuse_keys,
    unread_keys,
)
from megatron_keye.data.conversation.media import LIMIT_KEYS, LIST_KEYS, read_limits
from megatron_keye.data.conversation.tools import read_tools
from megatron_keye.data.conversation.turn import joined, joins, read_message
from megatron_keye.data.conversation.turns import Conversation, Message
from megatron_keye.data.conversation.values import is_given, shown
from megatron_keye.errors import UserError

_LIMITS = set(LIMIT_KEYS["video"])
_GROUNDING = "grounding_tokens"
_PROCESSOR = "mm_processor_kwargs"
_READ = {
    *("tools", _GROUNDING, _PROCESSOR, *LIST_KEYS["image"], *LIST_KEYS["video"], *_LIMITS),
}
_SURROGATE = re.compile(r"(?i)\\ud[89a-f]")
"""Escape of a half of a character, which is text only beside its other half."""


def parse_conversation(record: Any, name: str, base: Path) -> Conversation:
    """Read one record.

    Args:
        record: JSON text of an object, or the object. `forms.py` lists the forms of its turns,
            `turn.py`, `content.py`, `media.py` and `tools.py` what they hold.
        name: File and line, for error messages.
        base: Folder that relative media names start from.

    Raises:
        UserError: Starting with `name`: what was got, what was expected.
    """
    try:
        return _conversation(_loaded(record), name, base)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{name}: is nested too deeply, expected a conversation") from error


def _loaded(record: Any) -> Any:
    if not isinstance(record, (str, bytes)):
        return record
    try:
        text = record if isinstance(record, str) else record.decode()
        loaded = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(loaded, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 ({error}); convert the file") from error
    except UnicodeEncodeError as error:
        raise UserError(
            "has half of a character that JSON writes in two (\\ud800 to \\udfff), expected both; "
            "text was cut in between"
        ) from error
    # Also for a whole number of more digits than Python reads.
    except ValueError as error:
        raise UserError(f"is not valid JSON ({error}); one object per line") from error
    return loaded


def _conversation(record: Any, name: str, base: Path) -> Conversation:
    turns, read = read_turns(record)
    refuse_keys(record, REFUSED_IN_RECORD)
    unread = unread_keys(record, read | _READ)
    media = MediaLists.of(record, _limits(record))
    messages = _messages(turns, media, unread)
    media.check_empty()
    unread |= _idle_limits(media)
    has_grounding_tokens = _claim(record, _GROUNDING)
    for message in messages:
        texts = [part.value for part in message.parts if part.kind == "text"]
        for text in (*texts, message.thinking):
            unread |= plain_marks(text, has_grounding_tokens=has_grounding_tokens)
    return Conversation(
        name=name,
        messages=tuple(messages),
        tools=read_tools(record["tools"]) if is_given(record.get("tools")) else (),
        has_grounding_tokens=has_grounding_tokens,
        unread=tuple(sorted(unread)),
        base=base,
    )


def _messages(turns: list[Any], media: MediaLists, unread: set[str]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        try:
            message = read_message(turn, media, unread)
            if messages and joins(messages[-1], turn):
                messages[-1] = joined(messages[-1], message)
            else:
                messages.append(message)
        except UserError as error:
            raise UserError(f"message {number}: {error}") from error
    return messages


def _limits(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record says about rate and size of all its media."""
    options = record.get(_PROCESSOR)
    if not is_given(options):
        options = {}
    if not isinstance(options, dict):
        raise UserError(f"{_PROCESSOR!r}: got {shown(options)}, expected an object")
    unknown = sorted(unread_keys(options, _LIMITS))
    if unknown:
        known = ", ".join(sorted(_LIMITS))
        raise UserError(f"{_PROCESSOR!r} has {unknown[0]!r}, expected some of {known}")
    twice = sorted(key for key in options if is_given(record.get(key)))
    if twice:
        raise UserError(f"has {twice[0]!r} and {_PROCESSOR!r}.{twice[0]}, expected one of them")
    return read_limits(record, "video") | read_limits(options, "video")


def _idle_limits(media: MediaLists) -> set[str]:
    """Return the limits of a record that none of its media can obey."""
    obeyed = {key for kind in media.shown_kinds for key in LIMIT_KEYS[kind]}
    return set(media.limits) - obeyed


def _claim(record: Mapping[str, Any], key: str) -> bool:
    value = record.get(key)
    if value not in (None, True, False):
        raise UserError(f"{key!r}: got {shown(value)}, expected true or false")
    return bool(value)
