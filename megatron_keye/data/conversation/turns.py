# SPDX-License-Identifier: Apache-2.0
"""A conversation as everything downstream sees it, whatever form its record had."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_keye.data.video.limits import MediaLimits

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part of a message: text, or a media file in its place."""

    kind: Literal["text", "image", "video"]
    """What it is."""
    value: str
    """The text, or the name as written in the sample: a file, or for a video also a folder of
    frames; "" for a list of frames."""
    frame_names: tuple[str, ...] = ()
    """Files of a video that is a list of frames, in order."""
    frame_list_rate: float | None = None
    """Frames per second of a video that is a list or a folder of frames; None if not given."""
    start_seconds: float | None = None
    """Where a video's window starts; None for its beginning."""
    end_seconds: float | None = None
    """Where a video's window ends; None for its end."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    """What the sample says about rate and size."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that an assistant makes."""

    value: str
    """A JSON object of "name" and "arguments"."""
    weight: float | None
    """What its labels weigh, which may differ from the text before it: in some forms of records a
    call is a turn of its own."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn."""

    role: Role
    """Who speaks; "tool" for what a tool returned."""
    parts: tuple[Part, ...]
    """Text and media in reading order."""
    weight: float | None = None
    """What a label of the turn weighs in the loss, 0 or more; None for what its role decides."""
    thinking: str = ""
    """The chain of thought before an assistant's answer."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that follow an assistant's text."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One record of a sample file."""

    name: str
    """File and line, for error messages."""
    messages: tuple[Message, ...]
    """Turns in order."""
    tools: tuple[str, ...] = ()
    """Tools that may be called, as JSON objects."""
    has_grounding_tokens: bool = False
    """Whether grounding marks in its text, such as <|box_start|>, are written as tokens."""
    unread: tuple[str, ...] = ()
    """Keys of the record that nothing reads, and marks in its text that stay plain text."""
    base: Path = field(default_factory=Path)
    """Folder that relative media names start from."""
