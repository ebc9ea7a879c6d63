# SPDX-License-Identifier: Apache-2.0
"""The engine's tests on real GPUs: NCCL instead of gloo, Triton's kernels in float32.

In float64 the operators are the reference ones, so that what is left is the engine itself.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_keye.config import RolloutConfig, RunConfig
from megatron_keye.config.backends import transformer_engine_version
from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.rollout import replayed
from megatron_keye.rollout.cache import bytes_per_token
from megatron_keye.rollout.grid import generating_run
from megatron_keye.rollout.request import Request
from tests.support.ranks import run_on_ranks
from tests.support.refit import bring
from tests.support.rollout import build_engine, generated, prompt, request
from tests.support.rollout_cases import (
    ARRANGEMENTS,
    REQUESTS,
    SMALL,
    assert_same_answers,
    compare_with_training,
    generate_from,
    generate_with_new_weights,
    selections,
    tiny,
)
from tests.support.routes import compare_choices
from tests.support.tiny import tiny_run
from tests.support.train import let_go, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_engine = pytest.mark.skipif(
    transformer_engine_version() is None, reason="no Transformer Engine"
)
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")

TOLERANCES = {"fp32": 1e-4, "fp64": 1e-12}
FOUR_RANKS = "tensor 2 x data 2, expert 4"
ON_TWO = [name for name in ARRANGEMENTS if name != FOUR_RANKS]
PRECISIONS = pytest.mark.parametrize("precision", TOLERANCES)

Answers = dict[tuple[int, int], Any]


@pytest.fixture(scope="module")
def alone() -> dict[str, Answers]:
    """Return the answers of one GPU by precision."""
    return {name: generated(tiny(name, device="cuda"), REQUESTS) for name in TOLERANCES}


@PRECISIONS
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_log_probabilities_are_those_of_training(precision: str, quantization: str) -> None:
    run = tiny(precision, quantization=quantization, device="cuda")
    sampled = [each for each in REQUESTS if not each.law.is_greedy]
    ((worst, count),) = run_on_ranks(
        1, compare_with_training, run.to_json(), sampled, device="cuda"
    )
    assert count > 30
    assert worst < TOLERANCES[precision]


def test_a_cache_of_8_bits_scores_as_training_would_with_rounded_keys() -> None:
    run = tiny("fp64", cache_quantization="fp8", device="cuda")
    sampled = [each for each in REQUESTS if not each.law.is_greedy]
    compare = partial(compare_with_training, rounds_keys=True)
    ((worst, count),) = run_on_ranks(1, compare, run.to_json(), sampled, device="cuda")
    assert count > 30
    assert worst < 1e-12


@PRECISIONS
def test_selections_are_those_of_training(precision: str) -> None:
    asked = request(0, prompt(1, 14, (4, 6)), max_new_tokens=8)
    run = tiny(precision, device="cuda")
    (pairs,) = run_on_ranks(1, selections, run.to_json(), asked, device="cuda")
    assert len(pairs) == 4
    for got, trained in pairs:
        assert torch.equal(got, trained)


@needs_two
@PRECISIONS
@pytest.mark.parametrize("name", ON_TWO)
def test_answers_do_not_depend_on_batch_pages_or_grid(
    name: str, precision: str, alone: dict[str, Answers]
) -> None:
    run = tiny(precision, device="cuda", **ARRANGEMENTS[name])
    tolerance = TOLERANCES[precision]
    assert_same_answers(generated(run, REQUESTS), alone[precision], tolerance=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="fewer than four GPUs")
def test_four_gpus_answer_as_one(alone: dict[str, Answers]) -> None:
    run = tiny("fp64", device="cuda", **ARRANGEMENTS[FOUR_RANKS])
    assert_same_answers(generated(run, REQUESTS), alone["fp64"])


@needs_two
def test_a_replica_without_requests_runs_beside_the_others(alone: dict[str, Answers]) -> None:
    answers = generated(tiny("fp64", device="cuda", data=2, expert=2), REQUESTS[:1])
    assert_same_answers(answers, {key: alone["fp64"][key] for key in answers})


@needs_two
def test_weights_come_from_another_training_grid(
    alone: dict[str, Answers], tmp_path: Path
) -> None:
    # Fused optimizers, where they are installed, train no float64.
    train(tiny("fp32", device="cuda", pipeline=2), [], save_to=tmp_path)
    saved = tmp_path / "tiny" / "checkpoints" / "step-00000000"
    # Another seed, so that weights that are not loaded differ.
    run = generating_run(tiny("fp32", device="cuda", tensor=2, training={"seed": 9}), 2)
    for answers in run_on_ranks(2, generate_from, run.to_json(), saved, REQUESTS, device="cuda"):
        by_key = {(a.key, a.answer): a for a in answers}
        assert_same_answers(by_key, alone["fp32"], tolerance=TOLERANCES["fp32"])


def test_no_key_of_earlier_weights_is_read_after_new_ones_are_taken() -> None:
    asked = request(0, prompt(1, 12, (4, 6)), max_new_tokens=8)
    run = tiny("fp64", device="cuda")
    ((versions, errors),) = run_on_ranks(
        1, generate_with_new_weights, run.to_json(), asked, device="cuda"
    )
    assert versions == ((0, 4), (1, 4))
    assert min(errors[:4]) > 1e-6, "other weights give other scores"
    assert max(errors[4:]) < 1e-12


def _memory_around_a_sleep(run_json: str, requests: list[Request]) -> list[int]:
    """Return the bytes that torch has of a GPU before answers, with the cache, and asleep."""
    engine, _, model = build_engine(RunConfig.from_json(run_json))
    num_bytes = []
    for act in (engine.sleep, lambda: list(engine.generate(requests)), engine.sleep):
        act()
        torch.cuda.synchronize()
        num_bytes.append(torch.cuda.memory_allocated())
    let_go(model)
    return num_bytes


def test_a_sleeping_engine_has_no_cache_on_the_gpu() -> None:
    rollout = replace(SMALL, cache_tokens=400_000)
    run = tiny("fp32", device="cuda", rollout=rollout)
    (before, awake, asleep) = run_on_ranks(
        1, _memory_around_a_sleep, run.to_json(), REQUESTS[:1], device="cuda"
    )[0]
    of_cache = rollout.cache_tokens * bytes_per_token(run)
    assert awake - before > of_cache > 2**26
    assert asleep - before < of_cache / 100, "kernels' scratch memory may stay"


def _answers_of_ticks(
    run_json: str, requests: list[Request], *, captures: bool
) -> tuple[int, list[Answers]]:
    """Answer with two weights, by graphs or by launches over the same tensors.

    Also return the number of shapes.
    """
    run = RunConfig.from_json(run_json)
    engine, _, model = build_engine(run, fusions=Fusions(permutation=True))
    answers, num_captured = [], 0
    capture = replayed._capture_graph if captures else replayed.run_again
    with patch.object(replayed, "_capture_graph", capture):
        for version in (1, 2):
            answers.append({(a.key, a.answer): a for a in engine.generate(requests)})
            assert engine._replica is not None and engine._replica._replayed is not None
            num_captured = engine._replica._replayed.num_captured
            with torch.no_grad():
                for weight in model.stages[0].module.parameters():
                    weight.mul_(1.1)
            engine.take_weights(version)
    let_go(model)
    return num_captured, answers


@needs_engine
@pytest.mark.parametrize("cache_quantization", ["none", "fp8"])
def test_a_graph_answers_as_the_same_kernels_launched_one_by_one(cache_quantization: str) -> None:
    training = {"linear_layers": "transformer_engine", "expert_layers": "torch"}
    rollout = replace(SMALL, uses_cuda_graphs=True)
    run = tiny(
        "bf16",
        device="cuda",
        rollout=rollout,
        training=training,
        cache_quantization=cache_quantization,
    )
    (graphs, plain) = (
        run_on_ranks(
            1,
            partial(_answers_of_ticks, captures=captures),
            run.to_json(),
            REQUESTS,
            device="cuda",
        )[0]
        for captures in (True, False)
    )
    assert graphs[0] == plain[0] > 2, "several shapes"
    for got, expected in zip(graphs[1], plain[1], strict=True):
        assert_same_answers(got, expected, tolerance=1e-5)
    first, second = ([a.log_probs for a in each.values()] for each in graphs[1])
    assert first != second, "other weights give other scores"


def test_graphs_of_layers_that_wait_for_the_host_are_refused() -> None:
    run = tiny("fp32", device="cuda", rollout=replace(SMALL, uses_cuda_graphs=True))
    with pytest.raises(AssertionError, match="expected training.precision=bf16 and training.fus"):
        generated(run, REQUESTS[:1])


@needs_two
@pytest.mark.parametrize(
    ("degrees", "rollout"),
    [
        ({"tensor": 2, "expert": 2}, RolloutConfig(tensor=1, expert=1)),
        ({"pipeline": 2}, RolloutConfig(tensor=2, expert=2)),
        ({"context": 2, "expert": 2}, RolloutConfig()),
    ],
)
def test_weights_that_generate_are_those_of_a_checkpoint(
    degrees: dict[str, int], rollout: RolloutConfig, tmp_path: Path
) -> None:
    run = replace(tiny_run(device="cuda", **degrees), rollout=rollout)
    for found in run_on_ranks(2, bring, run.to_json(), str(tmp_path), device="cuda"):
        assert found[0], "they are equal bit for bit"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_token_goes_where_generation_sent_it(precision: str) -> None:
    run = tiny(precision, training={"phase": "dense"}, device="cuda")
    ((own, replayed),) = run_on_ranks(1, compare_choices, run.to_json(), device="cuda")
    assert own[0] > 0 == replayed[0]
    assert replayed[1] < own[1] / 2
