# SPDX-License-Identifier: Apache-2.0
"""A run asks questions when it is due, scores the answers, and tells of the scores."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config import RunConfig
from megatron_keye.config.evaluation import TASKS
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.errors import UserError
from megatron_keye.evaluation import Evaluation
from megatron_keye.rollout.request import Completion
from megatron_keye.scoring.tasks import TRUTHS
from megatron_keye.training.periodic_evaluation import PeriodicEvaluation
from megatron_keye.training.report import Report
from megatron_keye.training.step_clock import StepClock
from tests.support.forged import forge_few, run_on_clips
from tests.support.tiny import tiny_run

ALONE: Any = SimpleNamespace(rank=0, num_ranks=1, device=torch.device("cpu"))
NO_MODEL: Any = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return few forged clips."""
    return forge_few(tmp_path_factory.mktemp("evaluation") / "clips")


def opened(run: RunConfig) -> Evaluation:
    """Return an evaluation on one rank, without a model."""
    return Evaluation(run, ALONE, NO_MODEL, ALONE, uses_transformer_engine=False)


def saying(evaluation: Evaluation, texts: list[str], tokenizer_folder: Path) -> None:
    """Let an evaluation get these answers, one for each question."""
    tokenizer = load_tokenizer(str(tokenizer_folder))

    def completions() -> Iterator[Completion]:
        for key, text in enumerate(texts):
            ids = (*tokenizer.encode(text), tokenizer.control_id("<|im_end|>"))
            none = (0.0,) * len(ids)
            yield Completion(
                key=key,
                answer=0,
                token_ids=ids,
                log_probs=none,
                finish="stop",
                versions=((0, len(ids)),),
            )

    evaluation._completions = completions  # type: ignore[method-assign]


def test_right_answers_score_1_and_all_answers_are_written(folder: Path) -> None:
    run = run_on_clips(folder, "training.evaluation.num_questions=0")
    lines = [json.loads(line) for line in (folder / "held_out.questions.jsonl").open()]
    asked = [line for line in lines if line["task"] == "grounding"]
    answers = [line["messages"][-1]["content"] for line in asked]
    evaluation = opened(run)
    saying(evaluation, answers, folder / "tokenizer")
    assert evaluation(40) == {
        "grounding": {"mIoU": 1, "R1@0.3": 1, "R1@0.5": 1, "R1@0.7": 1, "not_understood": 0}
    }
    written = run.folder / "evaluations" / "step-00000040.jsonl"
    texts = [json.loads(line)["text"] for line in written.read_text().splitlines()]
    assert texts == answers
    saying(evaluation, [*answers[:-1], "red square"], folder / "tokenizer")
    scores = evaluation(41)["grounding"]
    assert scores["mIoU"] == scores["R1@0.7"] == (len(asked) - 1) / len(asked)
    assert scores["not_understood"] == 1 / len(asked)


def test_all_tasks_of_a_file_are_asked_up_to_a_number(folder: Path) -> None:
    run = run_on_clips(folder, "training.evaluation.task=", "training.evaluation.num_questions=3")
    evaluation = opened(run)
    saying(evaluation, ["nothing"] * 3, folder / "tokenizer")
    assert evaluation(1).keys() == {"grounding", "caption"}


def test_a_task_that_the_file_has_not_is_refused(folder: Path) -> None:
    run = run_on_clips(folder, "training.evaluation.task=count")
    with pytest.raises(UserError, match=r"task: got 'count', .* has caption, grounding"):
        opened(run)


def test_the_settings_know_the_tasks_of_scoring() -> None:
    assert set(TASKS) == set(TRUTHS)


def test_scores_are_shown_and_written_when_they_are_due(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run().with_overrides(
        [
            f"output_dir={tmp_path}",
            "training.evaluation.samples=q",
            "training.evaluation.interval_steps=3",
        ]
    )
    asked: list[int] = []

    def evaluate(step: int) -> dict[str, dict[str, float]]:
        asked.append(step)
        return {"count": {"accuracy": step / 10}}

    clock = StepClock()
    periodic = PeriodicEvaluation(run, clock, evaluate)
    progress = Progress(step=0, updates=0, data={})
    with Report(run, 0, 8) as report:
        for step in range(1, 9):
            # Also before the first step of a process that goes on: what is known is not asked.
            for _ in range(2):
                periodic.look(progress, report, is_last=False)
            progress.step = step
            periodic.look(progress, report, is_last=step == 8)
    assert asked == [3, 6, 8] and progress.evaluated_step == 8
    assert "evaluation after step 6: count accuracy 0.600" in capsys.readouterr().out
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"step": 8, "evaluation": {"count": {"accuracy": 0.8}}}
