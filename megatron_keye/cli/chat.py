# SPDX-License-Identifier: Apache-2.0
"""A chat on the terminal: typed lines are questions, answers come word by word.

Rank 0 reads and writes; the others get each prompt from it.
"""

import queue
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_keye.config import RunConfig
from megatron_keye.data.conversation import parse_conversation
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_prompt
from megatron_keye.data.tokens import Tokenizer
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.errors import UserError
from megatron_keye.parallel.process import Process
from megatron_keye.rollout.engine import Engine
from megatron_keye.rollout.request import NewToken, Request

_HELP = """\
/video FILE [START END]   show a video, or its seconds from START to END, with the next question
/image FILE               show an image with the next question
/new                      forget the conversation
/exit                     end; so does Ctrl-D
"""
_WAIT_SECONDS = 60.0
"""How long other ranks wait for a line before they are told that there is none yet."""
_BROKEN = "\ufffd"
"""What a character decodes to of which tokens are missing."""

Message = dict[str, Any]


class Chat:
    """One conversation after the other, until the user ends it."""

    def __init__(
        self,
        run: RunConfig,
        process: Process,
        engine: Engine,
        tokenizer: Tokenizer,
        make_request: Callable[[int, Sample], Request],
    ) -> None:
        """Begin without a turn.

        Args:
            run: Budgets of pictures.
            process: This rank.
            engine: Answers.
            tokenizer: Vocabulary.
            make_request: Makes a request of its number and a prompt.
        """
        self._run, self._process = run, process
        self._engine, self._tokenizer, self._make_request = engine, tokenizer, make_request
        self._messages: list[Message] = []
        self._shown: list[Message] = []
        """Media for the next question."""
        self._lines: queue.Queue[str] = queue.Queue()
        """Lines of standard input, "" at its end."""

    def talk(self) -> None:
        """Answer lines of standard input until it ends. Collective: all ranks."""
        self._say(f"{_HELP}> ")
        if self._process.rank == 0:
            threading.Thread(target=self._listen, daemon=True).start()
        key = 0
        while (prompt := self._next_prompt()) is not None:
            self._answer(self._make_request(key, prompt))
            key += 1

    def _next_prompt(self) -> Sample | None:
        """Return the next prompt on all ranks, None at the end."""
        while True:
            self._process.heartbeat.note("chat")
            word: tuple[str, Sample | None] = ("end", None)
            if self._process.rank == 0:
                word = self._read()
            words = [word]
            dist.broadcast_object_list(words, src=0, device=self._process.device)
            if words[0][0] != "wait":
                return words[0][1]

    def _listen(self) -> None:
        """Put lines into the queue, so that waiting for one can be cut short."""
        for line in sys.stdin:
            self._lines.put(line)
        self._lines.put("")

    def _read(self) -> tuple[str, Sample | None]:
        """Return "ask" and a prompt, "wait" where there is none yet, or "end"."""
        try:
            line = self._lines.get(timeout=_WAIT_SECONDS)
        except queue.Empty:
            return "wait", None
        if not line:
            return "end", None
        try:
            word = self._take_line(line.strip())
        except UserError as error:
            self._say(f"{error}\n")
            word = ("wait", None)
        if word[0] == "wait":
            self._say("> ")
        return word

    def _take_line(self, line: str) -> tuple[str, Sample | None]:
        command, *words = _split(line) if line.startswith("/") else [line]
        if command == "/exit":
            return "end", None
        if command == "/new":
            self._messages, self._shown = [], []
        elif command in ("/image", "/video"):
            self._shown.append(_medium(command[1:], words))
        elif command.startswith("/"):
            self._say(_HELP)
        elif command:
            return "ask", self._ask(line)
        return "wait", None

    def _ask(self, text: str) -> Sample:
        """Return the prompt of the conversation with one more question."""
        shown, self._shown = self._shown, []
        content = [*shown, {"type": "text", "text": text}]
        messages = [*self._messages, {"role": "user", "content": content}]
        conversation = parse_conversation({"messages": messages}, "chat", Path.cwd())
        prompt = make_prompt(
            conversation,
            self._tokenizer,
            self._run.data,
            self._run.model,
            skips_thinking=self._run.rollout.skips_thinking,
            probe_video=node_cache().probe,
        )
        self._messages = messages
        return prompt

    def _answer(self, request: Request) -> None:
        """Answer on all ranks; rank 0 shows the text as it grows."""
        began, token_ids, shown = time.monotonic(), list[int](), ""

        def show(token: NewToken) -> None:
            nonlocal shown
            if token.token_id in request.stop_ids:
                return
            token_ids.append(token.token_id)
            text = self._tokenizer.decode(token_ids).rstrip(_BROKEN)
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text

        is_first = self._process.rank == 0
        (completion,) = self._engine.generate([request], show if is_first else None)
        text = self._tokenizer.decode(token_ids)
        self._messages.append({"role": "assistant", "content": text})
        if is_first:
            sys.stdout.write("\n")
            sys.stdout.flush()
        seconds = time.monotonic() - began
        speed = describe_speed(len(completion.token_ids), seconds)
        self._say(f"[{completion.finish}, {speed}]\n> ")

    def _say(self, text: str) -> None:
        """Write what is no answer beside the answers, on rank 0."""
        if self._process.rank == 0:
            sys.stderr.write(text)
            sys.stderr.flush()


def describe_speed(num_tokens: int, seconds: float) -> str:
    """Return how fast tokens came, with the time of their prompts."""
    speed = num_tokens / max(seconds, 1e-9)
    return f"{num_tokens} tokens in {seconds:.1f} s, {speed:.1f} tokens/s"


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UserError(f"{line}: {error}; close the quotes") from error


def _medium(kind: str, words: list[str]) -> Message:
    """Return the content of a message that shows a medium."""
    num_wanted = (1, 3) if kind == "video" else (1,)
    if len(words) not in num_wanted:
        raise UserError(f"/{kind}: got {len(words)} words, expected a file; /help shows the form")
    part: Message = {"type": kind, kind: words[0]}
    try:
        part |= dict(zip(("start", "end"), map(float, words[1:]), strict=False))
    except ValueError as error:
        raise UserError(f"/{kind}: {error}, expected START and END in seconds") from error
    return part
