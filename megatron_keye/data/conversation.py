"""JSON lines of conversations, read into one form whatever of the usual spellings they are in.

Only the format is judged here, for the whole file before the run starts; media are opened when a
sample's turn comes.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_keye.config.check import suggest

ROLES = ("system", "user", "assistant")
_MARKERS = {"<image>": "image", "<video>": "video"}
_KEYS = {
    "text": {"type", "text"},
    "image": {"type", "image"},
    "video": {"type", "video", "start", "end"},
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a message: text, or a picture file that stands there."""

    kind: str
    """"text", "image" or "video"."""
    value: str
    """The text, or the file's name as the sample spells it."""
    start_seconds: float | None = None
    """Where a video's window starts; None for its beginning."""
    end_seconds: float | None = None
    """Where a video's window ends; None for its end."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn."""

    role: str
    """One of ROLES."""
    parts: tuple[Part, ...]
    """Text and pictures in reading order."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One line of a sample file."""

    name: str
    """File and line, for messages."""
    messages: tuple[Message, ...]
    """Turns in order."""
    base: Path = field(default_factory=Path)
    """Folder that relative media names start from."""


def read_conversations(path: Path) -> list[Conversation]:
    """Read a sample file; empty lines are skipped.

    Args:
        path: JSON lines, UTF-8.

    Raises:
        ValueError: Naming file and line of what is malformed, or the file if it has no samples.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 JSON lines ({error})") from error
    conversations = [
        parse_conversation(line, f"{path}:{number}", path.parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not conversations:
        raise ValueError(f"{path}: holds no samples, expected one conversation a line")
    return conversations


def parse_conversation(line: str, name: str, base: Path) -> Conversation:
    """Read one line.

    Args:
        line: A JSON object with "messages"; their content is text or a list of parts, or text
            with <image> and <video> markers beside top-level lists "images" and "videos".
        name: File and line, for messages.
        base: Folder that relative media names start from.

    Raises:
        ValueError: Starting with `name`: what was got, what was expected.
    """
    try:
        record = json.loads(line)
        return Conversation(name=name, messages=_messages(record), base=base)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: is not valid JSON ({error}); one object a line") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _messages(record: Any) -> tuple[Message, ...]:
    """Read all turns of one object."""
    raw = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(raw, list) or not raw:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"got {keys}, expected an object with a non-empty list 'messages'")
    media = {
        marker: _media_list(record, f"{kind}s")
        for marker, kind in _MARKERS.items()
        if record.get(f"{kind}s") is not None
    }
    messages = tuple(_message(message, media) for message in raw)
    for marker, unused in media.items():
        if unused:
            raise ValueError(
                f"'{_MARKERS[marker]}s' names {len(unused)} more than the messages have {marker} "
                "markers, expected one marker for each"
            )
    return messages


def _media_list(record: dict[str, Any], key: str) -> list[str]:
    names = record[key]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key!r}: got {names!r}, expected a list of file names")
    return list(names)


def _message(raw: Any, media: dict[str, list[str]]) -> Message:
    """Read one turn, taking its marked files off the front of the `media` lists."""
    if not isinstance(raw, dict) or "role" not in raw or "content" not in raw:
        raise ValueError(f"got message {raw!r}, expected an object with 'role' and 'content'")
    role, content = raw["role"], raw["content"]
    if role not in ROLES:
        raise ValueError(f"got role {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return Message(role=role, parts=tuple(_marked(content, media)))
    if not isinstance(content, list):
        raise ValueError(f"got content {content!r}, expected text or a list of parts")
    return Message(role=role, parts=tuple(_part(part) for part in content))


def _marked(text: str, media: dict[str, list[str]]) -> list[Part]:
    """Split text at the markers that the record has lists for."""
    parts: list[Part] = []
    while text:
        found = [(text.find(marker), marker) for marker in media if marker in text]
        place, marker = min(found, default=(len(text), ""))
        if place:
            parts.append(Part(kind="text", value=text[:place]))
        if marker:
            if not media[marker]:
                raise ValueError(
                    f"the messages have more {marker} markers than '{_MARKERS[marker]}s' names, "
                    "expected one file for each"
                )
            parts.append(Part(kind=_MARKERS[marker], value=media[marker].pop(0)))
        text = text[place + len(marker) :]
    return parts


def _part(raw: Any) -> Part:
    """Read one part of a list; unknown keys are refused, since they would be ignored."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"got part {raw!r}, expected 'type' to be one of {', '.join(_KEYS)}")
    unknown = sorted(raw.keys() - _KEYS[kind])
    if unknown:
        near = suggest(unknown[0], _KEYS[kind])
        raise ValueError(f"part of type {kind!r} has unknown {unknown[0]!r}; {near}")
    value = raw.get(kind)
    if not isinstance(value, str):
        raise ValueError(f"part of type {kind!r}: got {value!r}, expected text at {kind!r}")
    seconds = {key: raw.get(key) for key in ("start", "end")}
    for key, number in seconds.items():
        if number is not None and type(number) not in (int, float):
            raise ValueError(f"{key!r}: got {number!r}, expected seconds as a number")
    return Part(kind=kind, value=value, start_seconds=seconds["start"], end_seconds=seconds["end"])
