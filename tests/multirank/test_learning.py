# SPDX-License-Identifier: Apache-2.0
"""A model learns from rewards of its own answers, and its first mini-batch is its own law's."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_keye.config import OptimizerConfig, PostTrainingConfig, RolloutConfig, RunConfig
from megatron_keye.post_training.answered import AnsweredGroup
from megatron_keye.post_training.learning import Learned, Learning
from megatron_keye.post_training.reward import Reward
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.rollout.grid import generating_run
from megatron_keye.rollout.request import SamplingLaw
from tests.support.ranks import run_on_ranks
from tests.support.rollout import prompt, request
from tests.support.tiny import SyntheticPatches, tiny_run
from tests.support.train import build_step, let_go

ROLLOUT = RolloutConfig(page_tokens=8, cache_tokens=1_000, prefill_tokens=64)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, schedule="constant")


Lengths = list[tuple[int, int]]
"""Weights that drew each answer which was not aborted, and its tokens."""


def rewarded(key: int, token_ids: tuple[int, ...]) -> Reward:
    """Return the share of tokens below 30, for the second prompt of those from 30 to 59."""
    low = 30 * (key % 2)
    share = sum(low <= token < low + 30 for token in token_ids) / max(1, len(token_ids))
    return Reward(total=share, task=share, format=1.0, is_understood=True)


def _learn(run_json: str, num_steps: int) -> tuple[list[float], list[Learned], list[Lengths]]:
    """Return the mean reward of each step, what it learned, and its whole answers."""
    run = RunConfig.from_json(run_json)
    grid, model, _, step = build_step(run)
    engine = EmbeddedEngine(
        generating_run(run, run.parallel.num_ranks),
        grid,
        model,
        source=SyntheticPatches(),
        device=step._device,
    )
    learning = Learning(
        run,
        grid,
        model,
        step,
        pad_token_id=0,
        open_source=SyntheticPatches,
        device=step._device,
    )
    prompts, law = [prompt(1, 6), prompt(2, 6)], SamplingLaw.of(run.rollout)
    rewards, learned, lengths = [], [], []
    for number in range(num_steps):
        keys = [4 * number + place for place in range(4)]
        requests = [
            request(key, prompts[key % 2], num_answers=8, max_new_tokens=8, law=law)
            for key in keys
        ]
        completions = sorted(engine.generate(requests), key=lambda c: (c.key, c.answer))
        groups = []
        for key in keys:
            own = [c for c in completions if c.key == key]
            groups.append(
                AnsweredGroup(
                    key=key,
                    name=str(key),
                    task="test",
                    prompt=prompts[key % 2],
                    completions=own,
                    rewards=[rewarded(key, c.token_ids) for c in own],
                )
            )
        learned.append(learning([group for group in groups if group.teaches], number))
        rewards.append(float(np.mean([group.totals.mean() for group in groups])))
        lengths.append([c.versions[0] for c in completions if c.finish == "length"])
        engine.take_weights(number + 1)
    let_go(model)
    return rewards, learned, lengths


def pilot(**changes: object) -> RunConfig:
    settings = {"kind": "gspo", "minibatches": 2, "truncated": "scored"} | changes
    run = tiny_run(training={"steps": 1_000, "optimizer": OPTIMIZER})
    return replace(run, rollout=ROLLOUT, post_training=PostTrainingConfig(**settings))


def test_the_first_mini_batch_is_of_the_law_that_drew_it() -> None:
    run = pilot(old_log_probs="engine", minibatches=1)
    run = replace(run, rollout=replace(ROLLOUT, temperature=0.7))
    ((_, learned, lengths),) = run_on_ranks(1, _learn, run.to_json(), 2)
    for number, each in enumerate(learned):
        ratios = list(each.ratios.values())
        assert len(ratios) == len(lengths[number]) > 20 and len(each.metrics) == 1
        assert max(abs(ratio.mean - 1) for ratio in ratios) < 1e-6
        assert sum(ratio.clipped + ratio.not_finite for ratio in ratios) == 0
        assert each.log_prob_errors.max() < 1e-5
        assert len(each.log_prob_errors) == sum(size for _, size in lengths[number])
        assert {version for version, _ in lengths[number]} == {number}, "the newest weights"


@pytest.mark.slow
def test_both_sources_of_old_log_probabilities_learn_the_same() -> None:
    results = [
        run_on_ranks(1, _learn, pilot(old_log_probs=source).to_json(), 2)[0]
        for source in ("trainer", "engine")
    ]
    for trainer, engine in zip(results[0][1], results[1][1], strict=True):
        assert trainer.num_gated == 0 and trainer.ratios.keys() == engine.ratios.keys()
        for answer, ratio in trainer.ratios.items():
            assert ratio.mean == pytest.approx(engine.ratios[answer].mean, abs=1e-5)


@pytest.mark.slow
def test_the_reward_rises() -> None:
    ((rewards, learned, _),) = run_on_ranks(1, _learn, pilot(old_log_probs="engine").to_json(), 30)
    assert rewards[0] < 0.45
    assert np.mean(rewards[-5:]) > 0.95, rewards
    clipped = [ratio.clipped for each in learned for ratio in each.ratios.values()]
    assert 0.02 < np.mean(clipped) < 0.6
