# SPDX-License-Identifier: Apache-2.0
"""What `megatron-keye generate` does on one rank: opens the engine, answers a file or a chat."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_keye.checkpoint.folders import weights_folder
from megatron_keye.cli import rank
from megatron_keye.cli.chat import Chat, describe_speed
from megatron_keye.cli.progress import sample_bar
from megatron_keye.config import RunConfig
from megatron_keye.data.prompts import PromptFile, Question
from megatron_keye.data.row import Sample
from megatron_keye.data.tokens import Tokenizer, load_tokenizer
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.errors import UserError
from megatron_keye.parallel.process import Process
from megatron_keye.rollout.engine import Engine
from megatron_keye.rollout.grid import generating_run
from megatron_keye.rollout.opening import open_engine
from megatron_keye.rollout.request import Completion, Request, SamplingLaw, stop_ids
from megatron_keye.rollout.served import ServedEngine


def make_run(options: argparse.Namespace, num_ranks: int) -> RunConfig:
    """Return the run that the command line describes, on the grid on which it generates."""
    run = generating_run(rank.make_run(options, num_ranks), num_ranks)
    if options.samples is None:
        # Who chats may think for as long as he likes.
        run = replace(run, training=replace(run.training, hang_minutes=0))
    return run


def generate(run: RunConfig, process: Process, options: argparse.Namespace) -> bool:
    """Answer what the command line asks for, and return True.

    Args:
        run: From `make_run`.
        process: This rank.
        options: Parsed command line.

    Raises:
        UserError: For weights, samples or media that cannot be used.
    """
    tokenizer = load_tokenizer(run.data.tokenizer)
    questions = None
    if options.samples is not None:
        questions = PromptFile(
            options.samples,
            tokenizer,
            run.data,
            run.model,
            skips_thinking=run.rollout.skips_thinking,
            probe_video=node_cache().probe,
        )
    with _open_engine(run, process, options.weights) as engine:
        if questions is None:
            ask = partial(new_request, run, tokenizer)
            Chat(run, process, engine, tokenizer, ask).talk()
        else:
            _answer_file(run, process, engine, tokenizer, questions, options)
    return True


def _open_engine(
    run: RunConfig, process: Process, weights: Path | None
) -> AbstractContextManager[Engine]:
    """Return what opens the engine that the settings ask for."""
    if run.rollout.server:
        if process.num_ranks > 1:
            raise UserError(
                f"--ranks: got {process.num_ranks}, expected 1 with rollout.server, which computes"
            )
        return closing(ServedEngine(run))
    if weights is None:
        raise UserError("--weights: got none, expected a checkpoint, or a run's folder")
    return open_engine(run, process, weights_folder(weights), **rank.operators(run, process))


def new_request(
    run: RunConfig, tokenizer: Tokenizer, key: int, prompt: Sample, *, num_answers: int = 1
) -> Request:
    """Return the request of a prompt, with the law and the limits of the run."""
    return Request(
        key=key,
        prompt=prompt,
        num_answers=num_answers,
        max_new_tokens=run.rollout.max_new_tokens,
        stop_ids=stop_ids(tokenizer),
        law=SamplingLaw.of(run.rollout),
        seed=run.training.seed,
    )


def _answer_file(
    run: RunConfig,
    process: Process,
    engine: Engine,
    tokenizer: Tokenizer,
    questions: PromptFile,
    options: argparse.Namespace,
) -> None:
    """Answer all questions; rank 0 writes a line for each answer as it ends."""
    asked: dict[int, Question] = {}
    num_ended = Counter[int]()

    def requests() -> Iterator[Request]:
        for key in range(len(questions)):
            asked[key] = questions.read(key)
            prompt = asked[key].prompt
            yield new_request(run, tokenizer, key, prompt, num_answers=options.answers)

    began, num_tokens = time.monotonic(), 0
    with ExitStack() as opened:
        bar, out = None, None
        if process.rank == 0:
            out = opened.enter_context(_Output(options.out))
            bar = opened.enter_context(sample_bar("answering"))
            bar.begin(len(questions) * options.answers)
        for completion in engine.generate(requests()):
            num_tokens += len(completion.token_ids)
            if out is not None and bar is not None:
                out.write(_record(completion, asked[completion.key], tokenizer))
                bar.advance(1)
            num_ended[completion.key] += 1
            if num_ended[completion.key] == options.answers:
                del asked[completion.key]
    if process.rank == 0:
        sys.stderr.write(f"{describe_speed(num_tokens, time.monotonic() - began)}\n")


def _record(completion: Completion, question: Question, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "name": question.prompt.name,
        "answer": completion.answer,
        "text": tokenizer.decode(list(completion.text_ids)),
        "finish": completion.finish,
        "num_tokens": len(completion.token_ids),
        "log_prob": sum(completion.log_probs),
        "expected": question.expected,
    }


class _Output:
    """JSON lines on standard output, or in a file that has its name once it is complete."""

    def __init__(self, name: str | None) -> None:
        self._path = Path(name) if name is not None else None
        self._file: IO[str] = sys.stdout

    def __enter__(self) -> "_Output":
        if self._path is not None:
            try:
                self._file = self._partial(self._path).open("w", encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"--out: {self._path} cannot be written ({error.strerror}); name a file in a "
                    "folder that exists"
                ) from error
        return self

    def __exit__(self, kind: object, *failure: object) -> None:
        if self._path is None:
            return
        self._file.close()
        if kind is None:
            self._partial(self._path).replace(self._path)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record at once."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    @staticmethod
    def _partial(path: Path) -> Path:
        return path.with_name(path.name + ".partial")
