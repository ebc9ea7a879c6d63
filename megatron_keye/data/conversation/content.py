# SPDX-License-Identifier: Apache-2.0
"""The content of a turn: text with markers for media, or a list of parts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_keye.config.check import suggest
from megatron_keye.data.conversation.keys import unread_keys
from megatron_keye.data.conversation.media import (
    LIMIT_KEYS,
    WINDOW_KEYS,
    Kind,
    MediaValue,
    media_list,
    media_part,
    media_value,
)
from megatron_keye.data.conversation.turns import Part
from megatron_keye.data.conversation.values import is_given, shown
from megatron_keye.errors import UserError

_MARKER = re.compile("(<image>|<video>)")
_KINDS: tuple[Kind, ...] = ("image", "video")
_PART_KEYS: dict[str, set[str]] = {
    "text": {"type", "text"},
    "image": {"type", "image", "path", "url", *LIMIT_KEYS["image"]},
    "video": {"type", "video", "path", "url", *LIMIT_KEYS["video"], *WINDOW_KEYS},
    "image_url": {"type", "image_url", *LIMIT_KEYS["image"]},
    "video_url": {"type", "video_url", *LIMIT_KEYS["video"], *WINDOW_KEYS},
}


@dataclass(kw_only=True)
class MediaLists:
    """Files that a record or a message lists, which markers take from the front."""

    waiting: dict[Kind, list[MediaValue]]
    """Files that no marker has taken yet, of the kinds that are listed."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """What the record says about rate and size (`media.read_limits`)."""
    shown_kinds: set[Kind] = field(default_factory=set)
    """Kinds of which media were shown so far."""

    @classmethod
    def of(cls, raw: Mapping[str, Any], limits: Mapping[str, Any]) -> "MediaLists":
        """Return the lists of a record or a message."""
        lists = {kind: media_list(raw, kind) for kind in _KINDS}
        return cls(
            waiting={kind: files for kind, files in lists.items() if files is not None},
            limits=limits,
        )

    def take(self, kind: Kind, of_part: Mapping[str, Any] | None = None) -> Part:
        """Return the next file of a kind as a part, with the window and limits of `of_part`.

        Raises:
            UserError: When none is left.
        """
        if not self.waiting.get(kind):
            raise UserError(
                f"the messages have more <{kind}> markers than '{kind}s' names, expected one file "
                f"for each; text that means no {kind} goes into a part "
                '{"type": "text", "text": ...}'
            )
        return self.part(self.waiting[kind].pop(0), kind, of_part or {})

    def part(self, value: MediaValue, kind: Kind, of_part: Mapping[str, Any]) -> Part:
        """Return a file as a part, with its own window and limits."""
        self.shown_kinds.add(kind)
        return media_part(value, kind, self.limits, of_part)

    def check_empty(self) -> None:
        """Refuse files that no marker has taken.

        Raises:
            UserError: Naming their number.
        """
        for kind, left in self.waiting.items():
            if left:
                raise UserError(
                    f"'{kind}s' names {len(left)} more than the messages have <{kind}> markers, "
                    "expected one marker for each"
                )


def read_content(content: Any, media: MediaLists) -> list[Part]:
    """Read the content of a turn.

    Args:
        content: Text, in which <image> and <video> stand for listed files, or a list of parts,
            in whose text they are plain.
        media: Files that markers and parts without a name take.

    Raises:
        UserError: Saying what was got and expected.
    """
    if isinstance(content, str):
        pieces = [piece for piece in _MARKER.split(content) if piece]
        return [_text_or_medium(piece, media) for piece in pieces]
    if not isinstance(content, list):
        raise UserError(f"got content {shown(content)}, expected text or a list of parts")
    return [_part(part, media) for part in content]


def _text_or_medium(piece: str, media: MediaLists) -> Part:
    if _MARKER.fullmatch(piece):
        return media.take("image" if piece == "<image>" else "video")
    return Part(kind="text", value=piece)


def _part(raw: Any, media: MediaLists) -> Part:
    """Read one part of a list; a key that nothing reads is refused, since it would be ignored."""
    if isinstance(raw, str):
        return Part(kind="text", value=raw)
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in _PART_KEYS:
        known = ", ".join(_PART_KEYS)
        raise UserError(f"got part {shown(raw)}, expected 'type' to be one of {known}")
    unknown = sorted(unread_keys(raw, _PART_KEYS[kind]))
    if unknown:
        near = suggest(unknown[0], _PART_KEYS[kind])
        raise UserError(f"part of type {kind!r} has unknown {unknown[0]!r}; {near}")
    if kind == "text":
        if not isinstance(raw.get("text"), str):
            raise UserError(f"part of type 'text': got {shown(raw.get('text'))}, expected text")
        return Part(kind="text", value=raw["text"])
    return _medium(raw, kind, media)


def _medium(raw: Mapping[str, Any], kind: str, media: MediaLists) -> Part:
    """Read a part that shows a file; without a name it takes the next that the record lists."""
    shown_as: Kind = "video" if kind.startswith("video") else "image"
    given = [key for key in (kind, "path", "url") if is_given(raw.get(key))]
    if len(given) > 1:
        raise UserError(f"part of type {kind!r} has {given}, expected one of them")
    if not given and kind in _KINDS and shown_as in media.waiting:
        return media.take(shown_as, raw)
    if not given:
        raise UserError(f"part of type {kind!r}: got {shown(raw)}, expected text at {kind!r}")
    return media.part(media_value(raw[given[0]], repr(given[0]), shown_as), shown_as, raw)
