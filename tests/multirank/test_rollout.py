"""What the engine answers is what training scores, whatever the batch, the pages and the grid."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_keye.config import ExpertsConfig, IndexerConfig, RolloutConfig, RunConfig
from megatron_keye.rollout.request import Request, SamplingLaw
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
from tests.support.train import let_go

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
