"""What the engine answers is what training scores, whatever the batch, the pages and the grid."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_keye.checkpoint.training_checkpoint import read_weights
from megatron_keye.config import ExpertsConfig, IndexerConfig, RolloutConfig, RunConfig
from megatron_keye.rollout.grid import generating_run
from megatron_keye.rollout.request import Completion, NewToken, Request, SamplingLaw
from tests.support.ranks import run_on_ranks
from tests.support.rollout import (
    SelectionMeter,
    build_engine,
    generated,
    prompt,
    request,
    training_log_probs,
)
from tests.support.tiny import tiny_model, tiny_run
from tests.support.train import let_go, train

EXPERTS = ExpertsConfig(
    num_experts=4, num_experts_per_token=2, intermediate_size=24, balance_loss_weight=0.0
)
SMALL = RolloutConfig(page_tokens=4, cache_tokens=400, prefill_tokens=64)
TOLERANCES = {"fp32": 1e-5, "fp64": 1e-12}
REQUESTS = [
    request(0, prompt(1, 12, (4, 6), (2, 2))),
    request(1, prompt(2, 21), num_answers=3, max_new_tokens=5),
    request(2, prompt(3, 5, (2, 4)), num_answers=2, max_new_tokens=9),
    request(3, prompt(4, 1)),
    request(4, prompt(5, 30), law=SamplingLaw(temperature=0.0)),
]


def tiny(
    precision: str = "fp32",
    *,
    rollout: RolloutConfig = SMALL,
    training: dict[str, Any] | None = None,
    quantization: str = "none",
    **degrees: Any,
) -> RunConfig:
    indexer = IndexerConfig(num_heads=4, head_dim=8, top_k=12, quantization=quantization)
    model = tiny_model(experts=EXPERTS, indexer=indexer)
    training = {"precision": precision} | (training or {})
    return replace(tiny_run(model=model, training=training, **degrees), rollout=rollout)


def _compare(run_json: str, requests: list[Request]) -> tuple[float, int]:
    """Return the largest difference of log-probabilities, and the number of tokens."""
    run = RunConfig.from_json(run_json)
    engine, grid, model = build_engine(run)
    prompts = {each.key: each.prompt for each in requests}
    worst, count = 0.0, 0
    for answer in engine.generate(requests):
        scored, _ = training_log_probs(run, grid, model, prompts[answer.key], answer.token_ids)
        differences = (torch.tensor(answer.log_probs, dtype=scored.dtype) - scored).abs()
        worst, count = max(worst, float(differences.max())), count + len(differences)
    let_go(model)
    return worst, count


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
    ((worst, count),) = run_on_ranks(1, _compare, run.to_json(), sampled)
    assert count > 30
    assert worst < TOLERANCES[precision]


def _selections(run_json: str, asked: Request) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what each layer selects in the engine and in training, for all tokens that ran."""
    run, meter = RunConfig.from_json(run_json), SelectionMeter()
    engine, grid, model = build_engine(run, meter)
    (answer,) = engine.generate([asked])
    _, trained = training_log_probs(run, grid, model, asked.prompt, answer.token_ids)
    let_go(model)
    length = len(asked.prompt.token_ids)
    pairs = []
    for layer, (selected, *later) in meter.selected.items():
        num_new = len(answer.token_ids) - 1
        got = torch.cat([selected[:length], *later])
        pairs.append((got, trained[layer][0][: length + num_new]))
    return pairs


def test_selections_are_those_of_training() -> None:
    asked = request(0, prompt(1, 14, (4, 6)), max_new_tokens=8)
    (pairs,) = run_on_ranks(1, _selections, tiny("fp64").to_json(), asked)
    assert len(pairs) == 4
    for got, trained in pairs:
        assert torch.equal(got, trained)


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "pages of one token": {"rollout": replace(SMALL, page_tokens=1)},
    "prompts in parts, one answer after the other": {
        "rollout": replace(SMALL, prefill_tokens=7, max_sequences=1)
    },
    "a cache in which answers make room for older ones": {
        "rollout": replace(SMALL, cache_tokens=52, page_tokens=2)
    },
    "tensor 2 with sequence parallelism": {"tensor": 2, "expert": 2},
    "data 2 x expert 2": {"data": 2, "expert": 2},
    "vision apart": {"vision_ranks": 1, "rollout": replace(SMALL, prefill_tokens=20)},
    "tensor 2 x data 2, expert 4": {"tensor": 2, "data": 2, "expert": 4},
}
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


def test_a_replica_without_requests_runs_beside_the_others(
    alone: dict[tuple[int, int], Any],
) -> None:
    answers = generated(tiny("fp64", data=2, expert=2), REQUESTS[:1])
    assert_same_answers(answers, {key: alone[key] for key in answers})


def assert_same_answers(got: dict[tuple[int, int], Any], expected: Any) -> None:
    assert got.keys() == expected.keys()
    for key, answer in got.items():
        assert answer.token_ids == expected[key].token_ids, key
        assert answer.finish == expected[key].finish
        wanted = pytest.approx(expected[key].log_probs, abs=1e-12)
        assert answer.log_probs == wanted, key


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


def _generate_from(run_json: str, weights: Path, requests: list[Request]) -> list[Completion]:
    run = RunConfig.from_json(run_json)
    engine, grid, model = build_engine(run)
    read_weights(weights, run, model, grid)
    answers = list(engine.generate(requests))
    let_go(model)
    return answers


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
    for answers in run_on_ranks(2, _generate_from, run.to_json(), saved, REQUESTS):
        assert_same_answers({(a.key, a.answer): a for a in answers}, alone)


def _generate_with_new_weights(run_json: str, asked: Request) -> tuple[Any, list[float]]:
    """Change the weights after four tokens of an answer; return how far its scores are off."""
    run = RunConfig.from_json(run_json)
    engine, grid, model = build_engine(run)
    other = replace(asked, key=1, max_new_tokens=4)
    for answer in engine.generate([asked, other]):
        if answer.key == other.key:
            with torch.no_grad():
                for weight in model.stages[0].module.parameters():
                    weight.mul_(1.1)
            engine.take_weights(1)
    scored, _ = training_log_probs(run, grid, model, asked.prompt, answer.token_ids)
    let_go(model)
    return answer.versions, (
        torch.tensor(answer.log_probs, dtype=torch.float64) - scored
    ).abs().tolist()


def test_no_key_of_earlier_weights_is_read_after_new_ones_are_taken() -> None:
    asked = request(0, prompt(1, 12, (4, 6)), max_new_tokens=8)
    ((versions, errors),) = run_on_ranks(
        1, _generate_with_new_weights, tiny("fp64").to_json(), asked
    )
    assert versions == ((0, 4), (1, 4))
    assert min(errors[:4]) > 1e-6, "other weights give other scores"
    assert max(errors[4:]) < 1e-12
