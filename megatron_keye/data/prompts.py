# SPDX-License-Identifier: Apache-2.0
"""Prompts from a file of conversations: each up to the assistant's last turn, which is the model.

Records are those of training, so that a model can be asked what it was taught.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.conversation import Conversation, describe_unread, parse_conversation
from megatron_keye.data.media import resolve_media
from megatron_keye.data.records.file import RecordFile
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_prompt
from megatron_keye.data.tokens import Tokenizer
from megatron_keye.data.video.video_info import VideoInfo

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A record as it is asked."""

    prompt: Sample
    """Up to the opening of the answer, without labels."""
    expected: str | None
    """Text of the record's own answer, None where it has none."""


class PromptFile:
    """Questions of a sample file by number; checked when it is opened, tokenized when asked.

    Args:
        path: JSON lines, one JSON list, or parquet.
        tokenizer: Vocabulary.
        config: Budgets.
        model: Ids of placeholders, patch and merge size.
        skips_thinking: Whether prompts end with an empty block of thinking.
        probe_video: Reads a video's container.

    Raises:
        UserError: Naming file and line of what is malformed.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        config: DataConfig,
        model: ModelConfig,
        *,
        skips_thinking: bool,
        probe_video: Callable[[Path], VideoInfo],
    ) -> None:
        self._records = RecordFile(resolve_media(path, Path()))
        self._tokenizer, self._config, self._model = tokenizer, config, model
        self._skips_thinking, self._probe_video = skips_thinking, probe_video
        unread = Counter(name for n in range(len(self)) for name in self._parse(n).unread)
        if unread:
            _logger.warning("%s: %s", path, describe_unread(unread))

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self._records)

    def read(self, index: int) -> Question:
        """Return a question.

        Raises:
            UserError: For a medium that is missing or unreadable.
        """
        asked, expected = without_answer(self._parse(index))
        prompt = make_prompt(
            asked,
            self._tokenizer,
            self._config,
            self._model,
            skips_thinking=self._skips_thinking,
            probe_video=self._probe_video,
        )
        return Question(prompt=prompt, expected=expected)

    def _parse(self, index: int) -> Conversation:
        base = self._records.path.parent
        return parse_conversation(self._records.read(index), self._records.name(index), base)


def without_answer(conversation: Conversation) -> tuple[Conversation, str | None]:
    """Return a conversation up to its last answer, and that answer's text, None without one."""
    *before, last = conversation.messages
    if last.role != "assistant":
        return conversation, None
    text = "".join(part.value for part in last.parts if part.kind == "text")
    return replace(conversation, messages=tuple(before)), text
