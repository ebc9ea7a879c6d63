# SPDX-License-Identifier: Apache-2.0
"""The loop of a run that learns from its answers, without a model: evaluations, stops."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config import RunConfig
from megatron_keye.post_training.position import Position
from megatron_keye.post_training.rollouts import GenerationStopped
from megatron_keye.post_training.trainer import PolicyTrainer
from megatron_keye.training.periodic_evaluation import PeriodicEvaluation
from megatron_keye.training.step_clock import StepClock
from tests.support.tiny import tiny_run

ASKING = ("training.evaluation.samples=q", "training.evaluation.interval_steps=2")
NOTHING: Any = SimpleNamespace(look=lambda *_, **__: None, wait=lambda _: None)


def trainer_without_model(run: RunConfig, stops_in: tuple[str, int], asked: list[int]) -> Any:
    """Return a trainer whose steps do nothing, and which a signal stops somewhere in one.

    Args:
        run: The run.
        stops_in: "generate" or "learn", and the number of the step.
        asked: Gets the steps after which questions were asked.
    """
    trainer = object.__new__(PolicyTrainer)
    part, stops_in_step = stops_in
    clock = StepClock()

    def generate(*_: Any) -> Any:
        if part == "generate" and trainer._progress.step + 1 == stops_in_step:
            raise GenerationStopped({})

    def learn(*_: Any) -> None:
        trainer._progress.step += 1
        trainer.was_stopped = part == "learn" and trainer._progress.step == stops_in_step

    def evaluate(step: int) -> dict[str, dict[str, float]]:
        asked.append(step)
        return {}

    fields: dict[str, Any] = {
        "run": run,
        "clock": clock,
        "progress": Progress(step=0, updates=0, data={}),
        "position": Position(),
        "seconds": {},
        "saving": NOTHING,
        "parts": SimpleNamespace(rollouts=generate, prompts=SimpleNamespace(digest="")),
        "evaluation": PeriodicEvaluation(run, clock, evaluate),
        "learn": learn,
        "checkpoints": SimpleNamespace(save=lambda *_, **__: None),
    }
    vars(trainer).update({f"_{name}": value for name, value in fields.items()})
    trainer.was_stopped = False
    return trainer


@pytest.mark.parametrize("part", ["generate", "learn"])
def test_questions_that_a_stop_left_out_are_asked_first_after_it(part: str) -> None:
    run = tiny_run(training={"steps": 5}).with_overrides(list(ASKING))
    asked: list[int] = []
    trainer = trainer_without_model(run, (part, 4), asked)
    trainer._run_steps(None, None)
    num_done = 4 if part == "learn" else 3
    assert trainer.was_stopped and trainer._progress.step == num_done and asked == [2]
    going_on = trainer_without_model(run, (part, 0), asked)
    going_on._progress = trainer._progress
    going_on._run_steps(None, None)
    assert asked == [2, 4, 5], "as if it had not been stopped"


def test_a_process_that_ends_early_asks_no_more_than_the_run() -> None:
    run = tiny_run(training={"steps": 5, "stop_after_step": 3}).with_overrides(list(ASKING))
    asked: list[int] = []
    trainer_without_model(run, ("learn", 0), asked)._run_steps(None, None)
    assert asked == [2]
