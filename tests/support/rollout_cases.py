# SPDX-License-Identifier: Apache-2.0
"""The runs and requests of the engine's tests, and what ranks do in them, with gloo or NCCL."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_keye.checkpoint.training_checkpoint import read_weights
from megatron_keye.config import ExpertsConfig, IndexerConfig, RolloutConfig, RunConfig
from megatron_keye.decoder import attention
from megatron_keye.kernels.head_quantization import dequantize_heads, quantize_heads
from megatron_keye.rollout.request import Completion, Request, SamplingLaw
from tests.support.rollout import (
    SelectionMeter,
    build_engine,
    caches,
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
REQUESTS = [
    request(0, prompt(1, 12, (4, 6), (2, 2))),
    request(1, prompt(2, 21), num_answers=3, max_new_tokens=5),
    request(2, prompt(3, 5, (2, 4)), num_answers=2, max_new_tokens=9),
    request(3, prompt(4, 1)),
    request(4, prompt(5, 30), law=SamplingLaw(temperature=0.0)),
]


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


def tiny(
    precision: str = "fp32",
    *,
    rollout: RolloutConfig = SMALL,
    cache_quantization: str = "none",
    training: dict[str, Any] | None = None,
    quantization: str = "none",
    **degrees: Any,
) -> RunConfig:
    """Return a run of the tiny model that generates with a small cache."""
    indexer = IndexerConfig(num_heads=4, head_dim=8, top_k=12, quantization=quantization)
    model = tiny_model(experts=EXPERTS, indexer=indexer)
    training = {"precision": precision} | (training or {})
    rollout = replace(rollout, cache_quantization=cache_quantization)
    return replace(tiny_run(model=model, training=training, **degrees), rollout=rollout)


@contextmanager
def training_with_rounded_keys() -> Iterator[None]:
    """Let training attend to keys and values as a cache of 8 bits gives them back."""

    def rounded(attend: Callable[..., Any]) -> Callable[..., Any]:
        def call(q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, *rest: Any, **options: Any) -> Any:
            heads = (
                dequantize_heads(*quantize_heads(each), each.dtype) for each in (k_SGC, v_SGC)
            )
            return attend(q_THC, *heads, *rest, **options)

        return call

    names = "dense_attention_with_lse", "sparse_attention", "sparse_attention_with_loss"
    with ExitStack() as patches:
        for name in names:
            wrapped = rounded(getattr(attention, name))
            patches.enter_context(patch.object(attention, name, wrapped))
        yield


def compare_with_training(
    run_json: str, requests: list[Request], *, rounds_keys: bool = False
) -> tuple[float, int]:
    """Return the largest difference of log-probabilities, and the number of tokens."""
    with training_with_rounded_keys() if rounds_keys else nullcontext():
        return _compare_with_training(run_json, requests)


def _compare_with_training(run_json: str, requests: list[Request]) -> tuple[float, int]:
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


def selections(run_json: str, asked: Request) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
        pairs.append((got.cpu(), trained[layer][0][: length + num_new].cpu()))
    return pairs


def generate_from(run_json: str, weights: Path, requests: list[Request]) -> list[Completion]:
    """Answer with the weights of a checkpoint."""
    run = RunConfig.from_json(run_json)
    engine, grid, model = build_engine(run)
    read_weights(weights, run, model, grid)
    answers = list(engine.generate(requests))
    let_go(model)
    return answers


def generate_with_new_weights(
    run_json: str, asked: Request, *, rounds_keys: bool = False
) -> tuple[Any, list[float]]:
    """Change the weights after four tokens of an answer; return how far its scores are off."""
    with training_with_rounded_keys() if rounds_keys else nullcontext():
        return _generate_with_new_weights(run_json, asked)


def _generate_with_new_weights(run_json: str, asked: Request) -> tuple[Any, list[float]]:
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


def generate_around_a_sleep(run_json: str, requests: list[Request]) -> tuple[list[int], Any]:
    """Answer twice with a sleep between; return the bytes of all caches before, while and after.

    Also the answers of both times.
    """
    engine, _, model = build_engine(RunConfig.from_json(run_json))
    num_bytes, answers = [], []
    for _ in range(2):
        num_bytes.append(_cache_bytes())
        answers.append({(a.key, a.answer): a for a in engine.generate(requests)})
        num_bytes.append(_cache_bytes())
        engine.sleep()
    num_bytes.append(_cache_bytes())
    let_go(model)
    return num_bytes, answers


def _cache_bytes() -> int:
    """Return the bytes of keys, values and indexer keys that this process holds."""
    tensors = [t for cache in caches() for t in vars(cache).values() if t is not None]
    return sum(tensor.nbytes for tensor in tensors)


def assert_same_answers(
    got: dict[tuple[int, int], Any], expected: Any, *, tolerance: float = 1e-12
) -> None:
    """Compare answers by request and number: tokens, ends, and log-probabilities."""
    assert got.keys() == expected.keys()
    for key, answer in got.items():
        assert answer.token_ids == expected[key].token_ids, key
        assert answer.finish == expected[key].finish
        wanted = pytest.approx(expected[key].log_probs, abs=tolerance)
        assert answer.log_probs == wanted, key
