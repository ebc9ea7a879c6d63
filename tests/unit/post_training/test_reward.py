# SPDX-License-Identifier: Apache-2.0
"""What earns 0 and what earns 1, by task and form; what fails is not scored."""

import os
import time
from pathlib import Path

import pytest

from megatron_keye.config import PostTrainingConfig
from megatron_keye.post_training.reward import Reward, reward
from megatron_keye.post_training.reward_pool import Job, RewardPool
from megatron_keye.rollout.request import Finish
from megatron_keye.scoring.question import Question, user_turn
from megatron_keye.scoring.truth import ChoiceTruth, GroundingTruth

SETTINGS = PostTrainingConfig(kind="gspo", reward_processes=2, reward_seconds=1.0)
WHEN = GroundingTruth(intervals=((2.0, 4.0),))


def question(truth: GroundingTruth | ChoiceTruth = WHEN) -> Question:
    task = "grounding" if isinstance(truth, GroundingTruth) else "choice"
    return Question(
        id="1", task=task, messages=user_turn("a.mp4", "When?"), truth=truth, seconds=10.0
    )


@pytest.mark.parametrize(
    ("text", "finish", "task", "form", "total"),
    [
        ("[[2, 4]]", "stop", 1.0, 1.0, 1.0),
        ("[[2, 6]]", "stop", 0.5, 1.0, 0.55),
        ("[[6, 7]]", "stop", 0.0, 1.0, 0.1),
        ("[[2, 4]]", "length", 1.0, 0.0, 0.9),
        ("I do not know.", "stop", 0.0, 0.0, 0.0),
        ("<think>from 2</think> [[2, 4]]", "stop", 1.0, 1.0, 1.0),
        ("<think>from 2 [[2, 4]]", "stop", 0.0, 0.0, 0.0),
        ("[[2, 4]] <think>late</think> [[2, 4]]", "stop", 1.0, 0.0, 0.9),
        ("<think>a</think><think>b</think> [[2, 4]]", "stop", 1.0, 0.0, 0.9),
    ],
)
def test_total_is_of_task_and_form(
    text: str, finish: Finish, task: float, form: float, total: float
) -> None:
    found = reward(question(), text, finish, SETTINGS)
    assert (found.task, found.format) == (pytest.approx(task), form)
    assert found.total == pytest.approx(total)


def test_many_stretches_cost_more_than_they_find() -> None:
    every = str([[place, place + 1.0] for place in range(10)])
    assert reward(question(), every, "stop", SETTINGS).task == 0
    four = "[[2, 3], [3, 4], [2, 3.5], [3.5, 4]]"
    assert reward(question(), four, "stop", SETTINGS).task == pytest.approx(1.0)
    five = "[[2, 3], [3, 4], [2, 3.5], [3.5, 4], [2, 2.5]]"
    assert reward(question(), five, "stop", SETTINGS).task == pytest.approx(0.9)


def test_thinking_may_be_required() -> None:
    settings = PostTrainingConfig(kind="gspo", requires_thinking=True)
    assert reward(question(), "[[2, 4]]", "stop", settings).format == 0
    assert reward(question(), "<think>x</think>[[2, 4]]", "stop", settings).format == 1


def _hostile(asked: Question, text: str, finish: Finish, settings: PostTrainingConfig) -> Reward:
    if text == "raise":
        raise ZeroDivisionError("no such number")
    if text == "hang":
        time.sleep(1_000)
    if text == "die":
        os._exit(1)
    return reward(asked, text, finish, settings)


def test_what_fails_is_not_scored_and_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_keye.post_training.reward_pool._START_SECONDS", 30.0)
    pool = RewardPool(SETTINGS, _hostile)
    try:
        texts = ["[[2, 4]]", "[[2, 4]]", "hang", "raise", "die", "[[2, 6]]"]
        for number, text in enumerate(texts[:2]):
            pool.submit(Job(key=(number, 0), question=question(), text=text, finish="stop"))
        assert [each.total for each in pool.collect().values() if each] == [1.0, 1.0]
        began = time.monotonic()
        for number, text in enumerate(texts[2:]):
            pool.submit(Job(key=(number, 0), question=question(), text=text, finish="stop"))
        found = pool.collect()
        assert [found[number, 0] is None for number in range(4)] == [True, True, True, False]
        assert time.monotonic() - began < 25
        reasons = " ".join(sorted(pool.failures))
        assert "reward_seconds = 1" in reasons and "killed" in reasons
        assert "ZeroDivisionError: no such number" in reasons and Path(__file__).name in reasons
        assert pool.collect() == {} and not pool.failures
    finally:
        pool.close()
