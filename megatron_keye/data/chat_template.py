# SPDX-License-Identifier: Apache-2.0
"""Writes a conversation as Qwen3's chat template does, and what each piece of it weighs.

ChatML turns, tools in the system turn, calls and results between tags, thinking before the answer.
The text is that of transformers' template; see `DataConfig.thinking` for the two ways to treat
thinking.

Source: the chat template of Qwen3-30B-A3B-Thinking-2507 (tokenizer_config.json).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_keye.config import DataConfig
from megatron_keye.data.conversation.turns import Conversation, Message, Part
from megatron_keye.data.tokens import TURN_END, TURN_START
from megatron_keye.errors import UserError

_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_RESULT = ("<tool_response>", "</tool_response>")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text, a control token or a medium, in its place."""

    part: Part
    """What it is."""
    weight: float
    """What each of its tokens weighs as a label; 0 is not predicted. A medium never is."""
    is_control: bool = False
    """Whether the text is the name of a control token."""


def render(conversation: Conversation, config: DataConfig) -> Iterator[Piece]:
    """Write a conversation from its first piece to its last.

    A turn's own weight counts; without one the assistant's text, calls and thinking weigh 1 with
    the end of the turn, and the rest 0, or 1 with `loss_tokens` "text".

    Args:
        conversation: What to write.
        config: loss_tokens, thinking, trains_on_thinking and trains_on_shortened_turns.

    Raises:
        UserError: For a weight above 0 of a turn that is not the assistant's, unless
            `loss_tokens` is "text".
    """
    writer = _TurnWriter(config)
    turns = list(conversation.messages)
    query = _last_query(turns)
    if conversation.tools:
        system = turns.pop(0) if turns[0].role == "system" else None
        query -= system is not None
        yield from writer.system(system, conversation.tools)
    for index, message in enumerate(turns):
        if message.role == "assistant":
            is_last = index == len(turns) - 1
            yield from writer.assistant(message, is_after_query=index > query, is_last=is_last)
        elif message.role == "tool":
            yield from writer.tool(
                message,
                opens=index == 0 or turns[index - 1].role != "tool",
                closes=index == len(turns) - 1 or turns[index + 1].role != "tool",
            )
        else:
            yield from writer.turn(message.role, message.parts, writer.weight(message))


def render_prompt(
    conversation: Conversation, config: DataConfig, *, skips_thinking: bool = False
) -> Iterator[Piece]:
    """Write a conversation and the opening of the assistant's answer to it.

    Args:
        conversation: Its last turn is not the assistant's.
        config: As in `render`.
        skips_thinking: Whether the answer begins behind an empty block of thinking.

    Raises:
        UserError: When there is no turn to answer.
    """
    if not conversation.messages or conversation.messages[-1].role == "assistant":
        raise UserError("ends with the assistant's turn, expected one of the user to answer")
    yield from render(conversation, config)
    yield Piece(part=_text(TURN_START), weight=0.0, is_control=True)
    yield Piece(part=_text("assistant\n"), weight=0.0)
    if skips_thinking:
        yield Piece(part=_text("<think>\n\n</think>\n\n"), weight=0.0)


def _last_query(turns: Sequence[Message]) -> int:
    """Return the index of the last turn in which the user asks, the last turn if none does.

    Results of tools may also be written as the user's turns, in their tags.
    """
    for index in reversed(range(len(turns))):
        parts = turns[index].parts
        is_result = (
            all(part.kind == "text" for part in parts)
            and (text := "".join(part.value for part in parts)).startswith(_RESULT[0])
            and text.endswith(_RESULT[1])
        )
        if turns[index].role == "user" and not is_result:
            return index
    return len(turns) - 1


@dataclass(frozen=True)
class _TurnWriter:
    config: DataConfig

    def weight(self, message: Message) -> float:
        """Return what the labels of a turn weigh."""
        predicts_all = self.config.loss_tokens == "text"
        if message.role == "assistant":
            return _or_one(message.weight)
        if message.weight and not predicts_all:
            raise UserError(
                f"a turn of {message.role!r} has the weight {message.weight:g}, expected 0: only "
                "the assistant's turns are predicted; drop it, or set data.loss_tokens to 'text'"
            )
        return _or_one(message.weight) if predicts_all else 0.0

    def turn(self, role: str, parts: Sequence[Part], weight: float) -> Iterator[Piece]:
        """Write a turn whose parts weigh the same."""
        yield from self._open(role, weight)
        yield from (Piece(part=part, weight=weight) for part in (_text("\n"), *parts))
        yield from self._close(weight, weight)

    def system(self, message: Message | None, tools: Sequence[str]) -> Iterator[Piece]:
        """Write the system turn with the tools, behind the system's own text if it has any."""
        own = (*message.parts, _text("\n\n")) if message is not None else ()
        listed = "".join(f"\n{tool}" for tool in tools)
        weight = self.weight(message or Message(role="system", parts=()))
        parts = (*own, _text(_TOOLS_BEFORE + listed + _TOOLS_AFTER))
        yield from self.turn("system", parts, weight)

    def tool(self, message: Message, *, opens: bool, closes: bool) -> Iterator[Piece]:
        """Write a tool's result; neighbouring ones share a turn of the user."""
        weight = self.weight(message)
        if opens:
            yield from self._open("user", weight)
        before, after = (_text(f"\n{tag}") for tag in _RESULT)
        for part in (before, _text("\n"), *message.parts, after):
            yield Piece(part=part, weight=weight)
        if closes:
            yield from self._close(weight, weight)

    def assistant(
        self, message: Message, *, is_after_query: bool, is_last: bool
    ) -> Iterator[Piece]:
        """Write an answer: thinking, text, calls."""
        config, follows_template = self.config, self.config.thinking == "qwen3"
        keeps = bool(message.thinking) and (is_after_query or not follows_template)
        lost_thinking = bool(message.thinking) and not keeps
        share = 0.0 if lost_thinking and not config.trains_on_shortened_turns else 1.0
        weight = share * self.weight(message)
        frame = weight if config.loss_tokens == "text" else 0.0
        yield from self._open("assistant", frame)
        yield Piece(part=_text("\n"), weight=frame)
        parts = message.parts
        if keeps or (follows_template and is_after_query and is_last):
            block = f"<think>\n{message.thinking}\n</think>\n\n"
            # The empty block is the template's, not the assistant's.
            own = weight * config.trains_on_thinking
            yield Piece(part=_text(block), weight=own if keeps else frame)
            parts = _without_leading_newlines(parts)
        yield from (Piece(part=part, weight=weight) for part in parts)
        for index, call in enumerate(message.tool_calls):
            # The end of the turn weighs what stands before it.
            weight = share * _or_one(call.weight)
            # As the template does, even where only newlines stood that thinking took away.
            newline = "\n" if index or message.parts else ""
            text = f"{newline}<tool_call>\n{call.value}\n</tool_call>"
            yield Piece(part=_text(text), weight=weight)
        yield from self._close(weight, frame)

    def _open(self, role: str, weight: float) -> Iterator[Piece]:
        frame = weight if self.config.loss_tokens == "text" else 0.0
        yield Piece(part=_text(TURN_START), weight=frame, is_control=True)
        yield Piece(part=_text(role), weight=frame)

    def _close(self, weight: float, frame: float) -> Iterator[Piece]:
        yield Piece(part=_text(TURN_END), weight=weight, is_control=True)
        yield Piece(part=_text("\n"), weight=frame)


def _text(value: str) -> Part:
    return Part(kind="text", value=value)


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight


def _without_leading_newlines(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    if not parts or parts[0].kind != "text":
        return parts
    first = replace(parts[0], value=parts[0].value.lstrip("\n"))
    return (first, *parts[1:]) if first.value else parts[1:]
