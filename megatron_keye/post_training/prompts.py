# SPDX-License-Identifier: Apache-2.0
"""The questions that a run asks itself, in an order that only the seed decides."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.config.run import RunConfig
from megatron_keye.data.conversation import Conversation, parse_conversation
from megatron_keye.data.media import resolve_media
from megatron_keye.data.permutation import Permutation
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_prompt
from megatron_keye.data.tokens import Tokenizer
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError
from megatron_keye.scoring.question import Question
from megatron_keye.scoring.question_file import read_questions


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """A question with its prompt."""

    key: int
    """Number among all that the run asks."""
    name: str
    """File and question, for logs."""
    question: Question
    """What is asked, and what is right."""
    prompt: Sample
    """Tokens and pictures."""


class Prompts:
    """Questions by the number at which the run asks them."""

    def __init__(
        self, run: RunConfig, tokenizer: Tokenizer, probe_video: Callable[[Path], VideoInfo]
    ) -> None:
        """Read and check the questions.

        Args:
            run: Their file, its order, budgets and limits.
            tokenizer: Vocabulary.
            probe_video: Reads a video's container.

        Raises:
            UserError: Naming what is malformed.
        """
        self._run, self._tokenizer, self._probe_video = run, tokenizer, probe_video
        self._path = resolve_media(run.data.samples, Path())
        self._questions = read_questions(self._path)
        for number in range(len(self._questions)):
            self._parse(number)
        written = repr([question.written() for question in self._questions])
        self.digest = hashlib.sha256(written.encode()).hexdigest()
        """Changes when any question does."""

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self._questions)

    def read(self, key: int) -> AskedQuestion:
        """Return the question that the run asks as number `key`, from 0; each comes once a round.

        Raises:
            UserError: For a medium that cannot be read, or a prompt that leaves no room for an
                answer.
        """
        run = self._run
        epoch, number = divmod(key, len(self._questions))
        if run.data.shuffles:
            number = Permutation(len(self._questions), (run.training.seed, epoch))[number]
        prompt = make_prompt(
            self._parse(number),
            self._tokenizer,
            run.data,
            run.model,
            skips_thinking=run.rollout.skips_thinking,
            probe_video=self._probe_video,
        )
        name, length = self._name(number), len(prompt.token_ids)
        if length + run.rollout.max_new_tokens > run.data.row_tokens:
            raise UserError(
                f"{name}: has {length} tokens, which with rollout.max_new_tokens = "
                f"{run.rollout.max_new_tokens} do not fit into a row, expected at most "
                f"data.row_tokens = {run.data.row_tokens}; raise it, or lower data.frames"
            )
        return AskedQuestion(key=key, name=name, question=self._questions[number], prompt=prompt)

    def _name(self, number: int) -> str:
        return f"{self._path.name}, question {self._questions[number].id!r}"

    def _parse(self, number: int) -> Conversation:
        record = self._questions[number].written()
        return parse_conversation(record, self._name(number), self._path.parent)
