"""Reads JSON lines of conversations in any of the usual formats into one form.

The format of the whole file is checked before the run starts; media are opened when their sample
is drawn.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_keye.config.check import suggest
from megatron_keye.errors import UserError

ROLES = ("system", "user", "assistant")
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_MARKERS = {"<image>": "image", "<video>": "video"}
_KEYS = {
    "text": {"type", "text"},
    "image": {"type", "image"},
    "video": {"type", "video", "start", "end", "video_start", "video_end"},
}
# Keys that other trainers act on, in a record and in a message; ignoring them would alter samples.
_REFUSED_KEYS = ("tools", "objects", "audios", "chosen", "rejected", "rejected_response")
_REFUSED_MESSAGE_KEYS = ("tool_calls", "loss")
_URLS = ("http://", "https://", "data:")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part of a message: text, or a media file in its place."""

    kind: str
    """"text", "image" or "video"."""
    value: str
    """The text, or the file's name as written in the sample."""
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
    """Text and media in reading order."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One line of a sample file."""

    name: str
    """File and line, for error messages."""
    messages: tuple[Message, ...]
    """Turns in order."""
    base: Path = field(default_factory=Path)
    """Folder that relative media names start from."""


def read_conversations(path: Path) -> list[Conversation]:
    """Read a sample file; empty lines are skipped.

    Args:
        path: JSON lines, UTF-8.

    Raises:
        UserError: Naming file and line of what is malformed, or the file if it has no samples.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 JSON lines ({error})") from error
    conversations = [
        parse_conversation(line, f"{path}:{number}", path.parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not conversations:
        raise UserError(f"{path}: holds no samples, expected one conversation per line")
    return conversations


def parse_conversation(line: str, name: str, base: Path) -> Conversation:
    """Read one line.

    Args:
        line: A JSON object. Turns are in "messages" with "role" and "content", or in
            "conversations" with "from" and "value"; content is a list of parts, or text with
            <image> and <video> markers beside top-level "images" and "videos" ("image" and
            "video" for one file). A top-level "system" is the first turn.
        name: File and line, for error messages.
        base: Folder that relative media names start from.

    Raises:
        UserError: Starting with `name`: what was got, what was expected.
    """
    try:
        record = json.loads(line)
        return Conversation(name=name, messages=_messages(record), base=base)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: is not valid JSON ({error}); one object per line") from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _messages(record: Any) -> tuple[Message, ...]:
    """Read all turns of one object."""
    raw = _turns(record)
    _refuse_keys(record, _REFUSED_KEYS)
    media = {
        marker: names
        for marker, kind in _MARKERS.items()
        if (names := _media_list(record, kind)) is not None
    }
    messages = tuple(_message(message, media) for message in raw)
    for marker, unused in media.items():
        if unused:
            raise UserError(
                f"'{_MARKERS[marker]}s' names {len(unused)} more than the messages have {marker} "
                "markers, expected one marker for each"
            )
    return messages


def _turns(record: Any) -> list[Any]:
    """Return the turns with "role" and "content", whichever format they are in."""
    for key in ("messages", "conversations"):
        raw = record.get(key) if isinstance(record, dict) else None
        if isinstance(raw, list) and raw:
            break
    else:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f"got {keys}, expected an object with a non-empty list 'messages' or 'conversations'"
        )
    turns = [_as_role(turn) if isinstance(turn, dict) and "from" in turn else turn for turn in raw]
    system = record.get("system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _as_role(turn: dict[str, Any]) -> dict[str, Any]:
    """Convert a turn of "from" and "value" to "role" and "content"."""
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return others | {"role": role, "content": turn.get("value")}


def _refuse_keys(record: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        value = record.get(key)
        if value not in (None, [], "", True):
            raise UserError(
                f"has {key!r}: {value!r}, which would be ignored, expected plain turns; write it "
                "out in the text or drop it"
            )


def _media_list(record: dict[str, Any], kind: str) -> list[str] | None:
    """Return the top-level files of one kind: "videos", or "video" for one file or a list."""
    key = f"{kind}s" if record.get(f"{kind}s") is not None else kind
    names = record.get(key)
    if names is None:
        return None
    if key == kind and isinstance(names, str):
        names = [names]
    # ms-swift writes {"path": FILE} for a file that could also be inline bytes.
    if isinstance(names, list):
        names = [
            name["path"] if isinstance(name, dict) and set(name) == {"path"} else name
            for name in names
        ]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{key!r}: got {record[key]!r}, expected a list of file names")
    return [_file_name(name) for name in names]


def _file_name(name: str) -> str:
    """Return a media file's name without "file://"."""
    if name.startswith(_URLS):
        raise UserError(
            f"{name[:80]!r} is no file name, expected a file on this machine; download it first"
        )
    return name.removeprefix("file://")


def _message(raw: Any, media: dict[str, list[str]]) -> Message:
    """Read one turn; its markers take files from the front of the `media` lists."""
    if not isinstance(raw, dict) or "role" not in raw or "content" not in raw:
        raise UserError(f"got message {raw!r}, expected an object with 'role' and 'content'")
    _refuse_keys(raw, _REFUSED_MESSAGE_KEYS)
    role, content = raw["role"], raw["content"]
    if role not in ROLES:
        raise UserError(f"got role {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return Message(role=role, parts=tuple(_marked(content, media)))
    if not isinstance(content, list):
        raise UserError(f"got content {content!r}, expected text or a list of parts")
    return Message(role=role, parts=tuple(_part(part) for part in content))


def _marked(text: str, media: dict[str, list[str]]) -> list[Part]:
    """Split text at those markers for which the record lists files."""
    parts: list[Part] = []
    while text:
        found = [(text.find(marker), marker) for marker in media if marker in text]
        position, marker = min(found, default=(len(text), ""))
        if position:
            parts.append(Part(kind="text", value=text[:position]))
        if marker:
            if not media[marker]:
                raise UserError(
                    f"the messages have more {marker} markers than '{_MARKERS[marker]}s' names, "
                    "expected one file for each"
                )
            parts.append(Part(kind=_MARKERS[marker], value=media[marker].pop(0)))
        text = text[position + len(marker) :]
    return parts


def _part(raw: Any) -> Part:
    """Read one part of a list; unknown keys are refused, since they would be ignored."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"got part {raw!r}, expected 'type' to be one of {', '.join(_KEYS)}")
    unknown = sorted(raw.keys() - _KEYS[kind])
    if unknown:
        near = suggest(unknown[0], _KEYS[kind])
        raise UserError(f"part of type {kind!r} has unknown {unknown[0]!r}; {near}")
    value = raw.get(kind)
    if not isinstance(value, str):
        raise UserError(f"part of type {kind!r}: got {value!r}, expected text at {kind!r}")
    return Part(
        kind=kind,
        value=value if kind == "text" else _file_name(value),
        start_seconds=_seconds(raw, "start"),
        end_seconds=_seconds(raw, "end"),
    )


def _seconds(raw: dict[str, Any], key: str) -> float | None:
    """Read one end of a video's window; qwen-vl-utils prefixes its key with "video_"."""
    given = {name: raw[name] for name in (key, f"video_{key}") if raw.get(name) is not None}
    if len(given) > 1:
        raise UserError(f"got {given}, expected one of them")
    for name, number in given.items():
        if type(number) not in (int, float):
            raise UserError(f"{name!r}: got {number!r}, expected seconds as a number")
        return float(number)
    return None
