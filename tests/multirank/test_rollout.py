# SPDX-License-Identifier: Apache-2.0
"""What the engine answers is what training scores, whatever the batch, the pages and the grid."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_keye.config import RunConfig
from megatron_keye.rollout.cache import bytes_per_token
from megatron_keye.rollout.grid import generating_run
from megatron_keye.rollout.request import NewToken, Request
from tests.support.ranks import run_on_ranks
from tests.support.rollout import build_engine, generated, prompt, request
from tests.support.rollout_cases import (
    ARRANGEMENTS,
    REQUESTS,
    SMALL,
    assert_same_answers,
    compare_with_training,
    generate_around_a_sleep,
    generate_from,
    generate_with_new_weights,
    selections,
    tiny,
)
from tests.support.train import let_go, train

TOLERANCES = {"fp32": 1e-5, "fp64": 1e-12}


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("fp32", {}),
        ("fp64", {}),
        ("fp64", {"quantization": "fp8"}),
        ("fp64", {"training": {"phase": "dense"}}),
    ],
)
def test_log_probabilities_are_those_of_training(precision: str, settings: dict[str, Any]) -> None:
    run = tiny(precision, **settings)
    sampled = [each for each in REQUESTS if not each.law.is_greedy]
    ((worst, count),) = run_on_ranks(1, compare_with_training, run.to_json(), sampled)
    assert count > 30
    assert worst < TOLERANCES[precision]


@pytest.mark.parametrize(
    "settings",
    [{}, {"quantization": "fp8"}, {"training": {"phase": "dense"}}],
)
def test_a_cache_of_8_bits_scores_as_training_would_with_rounded_keys(
    settings: dict[str, Any],
) -> None:
    run = tiny("fp64", cache_quantization="fp8", **settings)
    sampled = [each for each in REQUESTS if not each.law.is_greedy]
    compare = partial(compare_with_training, rounds_keys=True)
    ((worst, count),) = run_on_ranks(1, compare, run.to_json(), sampled)
    assert count > 30
    assert worst < 1e-12
    ((error, _),) = run_on_ranks(1, compare_with_training, run.to_json(), sampled)
    assert 1e-4 < error < 1, "training itself does not round"


def test_selections_are_those_of_training() -> None:
    asked = request(0, prompt(1, 14, (4, 6)), max_new_tokens=8)
    (pairs,) = run_on_ranks(1, selections, tiny("fp64").to_json(), asked)
    assert len(pairs) == 4
    for got, trained in pairs:
        assert torch.equal(got, trained)


SLOW = ("vision apart", "tensor 2 x data 2, expert 4")


@pytest.fixture(scope="module")
def alone() -> dict[tuple[int, int], Any]:
    """Return the answers of one rank with room for everything."""
    return generated(tiny("fp64"), REQUESTS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in ARRANGEMENTS],
)
def test_answers_do_not_depend_on_batch_pages_or_grid(
    name: str, alone: dict[tuple[int, int], Any]
) -> None:
    assert_same_answers(generated(tiny("fp64", **ARRANGEMENTS[name]), REQUESTS), alone)


@pytest.fixture(scope="module")
def alone_in_8_bits() -> dict[tuple[int, int], Any]:
    """Return the answers of one rank whose cache has 8 bits."""
    return generated(tiny("fp64", cache_quantization="fp8"), REQUESTS)


@pytest.mark.parametrize(
    "name",
    [
        "prompts in parts, one answer after the other",
        "a cache in which answers make room for older ones",
        "tensor 2 with sequence parallelism",
    ],
)
def test_answers_of_8_bits_do_not_depend_on_batch_pages_or_grid(
    name: str, alone_in_8_bits: dict[tuple[int, int], Any]
) -> None:
    run = tiny("fp64", cache_quantization="fp8", **ARRANGEMENTS[name])
    assert_same_answers(generated(run, REQUESTS), alone_in_8_bits)


def test_a_replica_without_requests_runs_beside_the_others(
    alone: dict[tuple[int, int], Any],
) -> None:
    answers = generated(tiny("fp64", data=2, expert=2), REQUESTS[:1])
    assert_same_answers(answers, {key: alone[key] for key in answers})


def _listen(run_json: str, requests: list[Request]) -> list[bool]:
    """Return for each answer whether its tokens were told as they were drawn, and only those."""
    engine, _, model = build_engine(RunConfig.from_json(run_json))
    told: dict[tuple[int, int], list[tuple[int, float]]] = {}

    def listen(token: NewToken) -> None:
        told.setdefault((token.key, token.answer), []).append((token.token_id, token.log_prob))

    answers = list(engine.generate(requests, listen))
    let_go(model)
    return [
        told.get((answer.key, answer.answer), [])
        == list(zip(answer.token_ids, answer.log_probs, strict=True))
        for answer in answers
    ]


def test_tokens_are_told_as_they_are_drawn() -> None:
    asked = [request(key, prompt(key, 9), num_answers=4) for key in range(6)]
    (told,) = run_on_ranks(1, _listen, tiny().to_json(), asked)
    assert told == [True] * 24


@pytest.mark.slow
def test_weights_come_from_any_training_grid(
    alone: dict[tuple[int, int], Any], tmp_path: Path
) -> None:
    trained = tiny("fp64", pipeline=2, context=2, expert=2)
    train(trained, [], save_to=tmp_path)
    saved = tmp_path / "tiny" / "checkpoints" / "step-00000000"
    # Another seed, so that weights that are not loaded differ.
    run = generating_run(tiny("fp64", pipeline=2, tensor=2, training={"seed": 9}), 2)
    assert (run.parallel.decoder.tensor, run.parallel.decoder.data) == (2, 1)
    for answers in run_on_ranks(2, generate_from, run.to_json(), saved, REQUESTS):
        assert_same_answers({(a.key, a.answer): a for a in answers}, alone)


@pytest.mark.parametrize("cache_quantization", ["none", "fp8"])
def test_no_key_of_earlier_weights_is_read_after_new_ones_are_taken(
    cache_quantization: str,
) -> None:
    asked = request(0, prompt(1, 12, (4, 6)), max_new_tokens=8)
    run = tiny("fp64", cache_quantization=cache_quantization)
    rounds_keys = cache_quantization == "fp8"
    generate = partial(generate_with_new_weights, rounds_keys=rounds_keys)
    ((versions, errors),) = run_on_ranks(1, generate, run.to_json(), asked)
    assert versions == ((0, 4), (1, 4))
    assert min(errors[:4]) > 1e-6, "other weights give other scores"
    assert max(errors[4:]) < 1e-12


@pytest.mark.parametrize("cache_quantization", ["none", "fp8"])
def test_a_cache_gives_its_memory_back_while_the_engine_sleeps(
    cache_quantization: str, request: pytest.FixtureRequest
) -> None:
    name = "alone" if cache_quantization == "none" else "alone_in_8_bits"
    alone = request.getfixturevalue(name)
    # What replays ticks holds the cache too.
    rollout = replace(SMALL, uses_cuda_graphs=True)
    run = tiny("fp64", rollout=rollout, cache_quantization=cache_quantization)
    ((num_bytes, answers),) = run_on_ranks(1, generate_around_a_sleep, run.to_json(), REQUESTS)
    # One page more takes what padding writes.
    full = (run.rollout.cache_tokens + run.rollout.page_tokens) * bytes_per_token(run)
    assert num_bytes == [0, full, 0, full, 0]
    for each in answers:
        assert_same_answers(each, alone)
