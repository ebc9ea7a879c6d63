# SPDX-License-Identifier: Apache-2.0
"""Scores of a model's answers while it trains: with its own weights, on the ranks of training.

The cache of keys and values lives for one evaluation, in memory that the step has given back, and
so do weights that ranks generate with but do not train.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.data.conversation import parse_conversation
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_prompt
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing
from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.process import Process
from megatron_keye.rollout.cache import count_pages
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.rollout.generating_model import open_generating_model
from megatron_keye.rollout.request import Completion, Request, SamplingLaw, stop_ids
from megatron_keye.scoring.answers import Answer
from megatron_keye.scoring.question import Question
from megatron_keye.scoring.question_file import read_questions
from megatron_keye.scoring.summary import ScoredQuestion, score_questions, summarize
from megatron_keye.training.patch_source import open_patch_source
from megatron_keye.training.sinks import Scores

_logger = logging.getLogger(__name__)


class Evaluation:
    """Answers the same questions each time it is called, and scores the answers."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: KeyeModel,
        process: Process,
        *,
        uses_transformer_engine: bool,
        fusions: Fusions = PLAIN,
    ) -> None:
        """Read the questions and make prompts of them. Collective: all ranks must call it.

        Args:
            run: The run that trains; `rollout` says on which degrees it answers.
            grid: Groups of this rank.
            model: This rank's modules.
            process: This rank.
            uses_transformer_engine: Whether linear layers are Transformer Engine's.
            fusions: The fused kernels that run.

        Raises:
            UserError: For questions or media that cannot be read, no question of the task, or
                degrees that do not fit the ranks.
        """
        settings = run.training.evaluation
        self._folder = run.folder / "evaluations"
        self._generating = open_generating_model(
            replace(run, rollout=replace(run.rollout, server="")),
            process,
            grid,
            model,
            uses_transformer_engine=uses_transformer_engine,
            fusions=fusions,
        )
        self._run, self._process = self._generating.run, process
        self._tokenizer = load_tokenizer(run.data.tokenizer)
        self._questions = _asked(Path(settings.samples), settings.task, settings.num_questions)
        base, stops = Path(settings.samples).parent, stop_ids(self._tokenizer)
        self._requests = [
            Request(
                key=key,
                prompt=self._prompt(question, base),
                max_new_tokens=settings.max_new_tokens,
                stop_ids=stops,
                law=SamplingLaw(temperature=0.0),
                seed=run.training.seed,
            )
            for key, question in enumerate(self._questions)
        ]
        if process.rank == 0:
            _logger.info("asking %d questions of %s", len(self._questions), settings.samples)

    def __call__(self, step: int) -> Scores:
        """Answer all questions; return the means over those of each task. Collective.

        Beside each task's own metrics, "not_understood" is the share of answers that could not be
        read. Rank 0 writes the answers to evaluations/step-STEP.jsonl.

        Args:
            step: Steps done.

        Raises:
            UserError: For media that cannot be read, or a prompt that the cache cannot hold.
        """
        answers: dict[str, list[Answer]] = {}
        for completion in self._completions():
            question = self._questions[completion.key]
            answers.setdefault(question.id, []).append(self._answer(completion))
        scored = score_questions(self._questions, answers)
        if self._process.rank == 0:
            self._write(step, scored)
        by_task: dict[str, list[ScoredQuestion]] = {}
        for each in scored:
            by_task.setdefault(each.question.task, []).append(each)
        scores = {}
        for task, of_task in by_task.items():
            summary = summarize(of_task)[0]
            share = summary.num_not_understood / len(of_task)
            scores[str(task)] = {**summary.metrics, "not_understood": share}
        return scores

    def _prompt(self, question: Question, base: Path) -> Sample:
        """Return a question as the model reads it; its media are named from `base`."""
        name = f"{self._run.training.evaluation.samples}: {question.id}"
        return make_prompt(
            parse_conversation(question.written(), name, base),
            self._tokenizer,
            self._run.data,
            self._run.model,
            skips_thinking=self._run.rollout.skips_thinking,
            probe_video=node_cache().probe,
        )

    def _completions(self) -> Iterator[Completion]:
        generating, device = self._generating, self._process.device
        source = open_patch_source(self._run, generating.model, device, node_cache().probe)
        try:
            if generating.refit is not None:
                # The cache takes what the weights leave.
                generating.refit.renew()
            engine = EmbeddedEngine(
                self._with_cache(),
                generating.grid,
                generating.model,
                source=source,
                device=device,
                heartbeat=self._process.heartbeat,
                refit=generating.refit,
            )
            yield from engine.generate(self._requests)
            engine.sleep()
        finally:
            if source is not None:
                source.close()

    def _with_cache(self) -> RunConfig:
        """Return the run with a cache for all questions at once, or what there is memory for."""
        rollout = self._run.rollout
        if rollout.cache_tokens:
            return self._run
        if self._process.device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(len(request.prompt.token_ids) for request in self._requests)
        # Each may begin and end within a page.
        each = longest + self._requests[0].max_new_tokens + 2 * rollout.page_tokens
        wanted = each * min(len(self._requests), rollout.max_sequences)
        there = rollout.page_tokens * count_pages(self._run, self._process.device)
        return replace(self._run, rollout=replace(rollout, cache_tokens=min(wanted, there)))

    def _answer(self, completion: Completion) -> Answer:
        return Answer(
            number=completion.answer,
            text=self._tokenizer.decode(list(completion.text_ids)),
            is_cut=completion.finish == "length",
        )

    def _write(self, step: int, scored: Sequence[ScoredQuestion]) -> None:
        lines = [json.dumps(line) + "\n" for each in scored for line in each.written()]
        with writing(self._folder, "answers"):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"step-{step:08}.jsonl").write_text("".join(lines))


def _asked(path: Path, task: str, most: int) -> list[Question]:
    """Return the questions of a task, or of all, in the order of their file."""
    questions = read_questions(path)
    asked = [each for each in questions if not task or each.task == task]
    if not asked:
        there = ", ".join(sorted({each.task for each in questions}))
        raise UserError(
            f"training.evaluation.task: got {task!r}, expected a task of {path}, which has {there}"
        )
    return asked[: most or None]
