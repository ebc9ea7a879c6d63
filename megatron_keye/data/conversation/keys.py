# SPDX-License-Identifier: Apache-2.0
"""Keys of records and messages that are refused, since other trainers act on them, or counted.

A key that is in no table is harmless as far as anyone knows (an id, a source). It changes nothing,
but preparing and training show it once, so that a misspelt key is seen.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_keye.data.conversation.values import is_given, shown
from megatron_keye.errors import UserError

_PREFERENCES = "is preference data, which is not trained on; write the answer to learn as a turn"
_AUDIO = "needs an audio encoder, which the model has not; drop the record or the key"
_TOKENS = "is already tokenized; give the text of the turns"
_TURN_WEIGHT = "would weigh the whole record; write it into the assistant's turns"
_GROUNDING = "would be filled into the text; write boxes and names out in it"
_TEMPLATE = "would change how turns are written; see data.thinking and data.trains_on_thinking"
_OLD_TOOLS = "is the old form of 'tools'; write each as a tool of type 'function'"

REFUSED_IN_RECORD: dict[str, str] = {
    # trl, ms-swift, LLaMA-Factory
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "kto_tag", "label"), _PREFERENCES),
    **dict.fromkeys(("rejected_messages", "rejected_images", "rejected_videos"), _PREFERENCES),
    **dict.fromkeys(("positive_messages", "negative_messages", "margin"), _PREFERENCES),
    **dict.fromkeys(("audios", "audio", "audio_path"), _AUDIO),
    **dict.fromkeys(("input_ids", "labels", "attention_mask", "assistant_masks"), _TOKENS),
    **dict.fromkeys(("completion_mask", "pixel_values"), _TOKENS),
    **dict.fromkeys(("loss", "weight", "train", "loss_mask", "loss_scale"), _TURN_WEIGHT),
    "objects": _GROUNDING,
    "chat_template_kwargs": _TEMPLATE,
    # OpenAI
    **dict.fromkeys(("functions", "function_call"), _OLD_TOOLS),
    **dict.fromkeys(("tool_choice", "response_format"), "would bind the answer, which is given"),
}
"""Keys of a record, and why they are refused."""

REFUSED_IN_MESSAGE: dict[str, str] = {
    **dict.fromkeys(("audio", "audios"), _AUDIO),
    **dict.fromkeys(("chosen", "rejected"), _PREFERENCES),
    "objects": _GROUNDING,
    **dict.fromkeys(("train_detail", "loss_weights", "masks"), "marks parts of a turn; split it"),
    "refusal": "is an answer in another place; write it as the content",
    "prefix": "continues the turn; write the whole answer as one turn",
    "tools": "belongs into the record; the turns of a conversation have the same tools",
    "reasoning_details": "is thinking in parts; write its text as 'reasoning_content'",
}
"""Keys of a message, and why they are refused."""

_MARK = re.compile(r"<\|\w+\|>")
GROUNDING_MARK = re.compile(r"(<\|(?!im_|vision_)\w+_(?:start|end)\|>)")
"""Marks that a record may have written as tokens: not those of turns and of pictures."""


def refuse_keys(raw: Mapping[str, Any], table: Mapping[str, str]) -> None:
    """Refuse what other trainers act on.

    Raises:
        UserError: Naming the first such key that says anything, and why.
    """
    for key, reason in table.items():
        if is_given(raw.get(key)):
            raise UserError(f"has {key!r}: {shown(raw[key])}, which {reason}")


def unread_keys(raw: Mapping[str, Any], read: Iterable[str], prefix: str = "") -> set[str]:
    """Return the keys that say something and that nothing reads.

    Args:
        raw: A record or a part of it.
        read: The keys that are read.
        prefix: Where the part is in the record.
    """
    known = set(read)
    return {f"{prefix}{key}" for key, value in raw.items() if key not in known and is_given(value)}


def plain_marks(text: str, *, has_grounding_tokens: bool) -> set[str]:
    """Return the control marks in a text that are not written as tokens."""
    marks = set(_MARK.findall(text)) if "<|" in text else set()
    return {mark for mark in marks if not (has_grounding_tokens and GROUNDING_MARK.match(mark))}


def describe_unread(counts: Mapping[str, int]) -> str:
    """Return what a user should know of what was not read, "" if all was.

    Args:
        counts: Samples that have it, for each entry of `Conversation.unread`.
    """
    keys: list[str] = []
    marks: list[str] = []
    for name, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        (marks if _MARK.fullmatch(name) else keys).append(f"{name} ({number:,})")
    sentences = []
    if keys:
        sentences.append(f"keys that were not read: {', '.join(keys)}")
    if marks:
        sentences.append(
            f"marks that stay plain text: {', '.join(marks)}; "
            "'grounding_tokens': true in a record writes those of grounding as tokens"
        )
    return "; ".join(sentences)
