# SPDX-License-Identifier: Apache-2.0
"""Steps that a run names are traced, and each module of the account has a measured place."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_keye.config import RunConfig
from megatron_keye.config.profiler import ProfilerConfig
from megatron_keye.errors import UserError
from megatron_keye.profiling.places import OUTSIDE, PHASES, PLACES
from megatron_keye.profiling.rank_step import RankStep, read_rank_step
from megatron_keye.training.module_ranges import _NAMES, range_name
from megatron_keye.training.step_profiler import STEP_RANGE, StepProfiler
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import build_step, let_go

ONLY_IN_PARTS = {"transport", "data", "decoder.other", "vision.other", "decoder.dispatch", "other"}


def traced_run(folder: Path, **training: Any) -> RunConfig:
    """Return a run that traces its second step."""
    settings = training | {"profiler": ProfilerConfig(trace_steps=(2,))}
    return replace(tiny_run(training=settings), output_dir=str(folder))


def train_two_steps(run_json: str) -> list[dict[str, float]]:
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    found = [step(mixed_rows(number), number) for number in range(2)]
    let_go(model)
    return [{"loss": each.loss, "norm": each.gradient_norm} for each in found]


def trace_of(run: RunConfig) -> tuple[RankStep, list[dict[str, float]]]:
    """Train two steps and return the trace of the second, and what both computed."""
    (figures,) = run_on_ranks(1, train_two_steps, run.to_json(), device=run.device)
    folder = run.folder / "profiler"
    assert [each.name for each in folder.iterdir()] == ["step-2"]
    return read_rank_step(folder / "step-2" / "rank-00000.trace.json.gz", STEP_RANGE), figures


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[RankStep, list[dict[str, float]]]:
    run = traced_run(tmp_path_factory.mktemp("traced"), dense_up_to=30, recompute="full")
    return trace_of(run)


def test_every_module_of_the_account_has_a_measured_place_and_the_reverse(
    traced: tuple[RankStep, Any],
) -> None:
    step, _ = traced
    in_account = {work["module"] for work in step.facts["works"]}
    measured = {module for module, _ in step.modules}
    assert {"decoder.attention.dense", "decoder.attention.selected"} <= in_account
    assert measured - set(OUTSIDE) == in_account
    assert measured & set(OUTSIDE) <= ONLY_IN_PARTS


def test_a_traced_step_is_explained_whole(traced: tuple[RankStep, Any]) -> None:
    step, _ = traced
    explained = sum(step.modules.values()) + step.exposed_seconds
    assert explained == pytest.approx(step.seconds, rel=0.03)


def test_a_recomputed_layer_is_measured_in_three_passes(traced: tuple[RankStep, Any]) -> None:
    step, _ = traced
    for module in ("decoder.experts", "decoder.attention.projections", "vision.linear"):
        passes = {in_pass for name, in_pass in step.modules if name == module}
        assert passes == {"forward", "backward", "recomputed"}, module
    # The selection of the first pass is kept.
    selecting = {in_pass for name, in_pass in step.modules if name == "decoder.indexer.top_k"}
    assert selecting == {"forward"}


def test_a_trace_changes_nothing_that_is_computed(
    traced: tuple[RankStep, list[dict[str, float]]], tmp_path: Path
) -> None:
    run = traced_run(tmp_path, dense_up_to=30, recompute="full")
    plain = replace(run, training=replace(run.training, profiler=ProfilerConfig()))
    (figures,) = run_on_ranks(1, train_two_steps, plain.to_json())
    assert figures == traced[1]
    assert not plain.folder.exists()


@pytest.mark.slow
def test_the_warm_up_has_its_places_too(tmp_path: Path) -> None:
    step, _ = trace_of(traced_run(tmp_path, phase="indexer_warmup"))
    in_account = {work["module"] for work in step.facts["works"]}
    assert {module for module, _ in step.modules} - set(OUTSIDE) == in_account


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_of_a_gpu_belong_to_modules(tmp_path: Path) -> None:
    step, _ = trace_of(replace(traced_run(tmp_path, recompute="full"), device="cuda"))
    in_account = {work["module"] for work in step.facts["works"]}
    measured = {module for module, _ in step.modules}
    # Hopper's indexer selects while it scores.
    assert in_account - measured <= {"decoder.indexer.top_k"}
    assert measured - set(OUTSIDE) <= in_account
    assert ("decoder.experts", "recomputed") in step.modules
    assert step.modules["other", "forward"] < 0.2 * sum(step.modules.values())
    assert "optimizer state and rest" in step.memory.held
    assert max(step.memory.kinds["activations"]) > 0


def test_memory_is_kept_by_the_modules_that_have_a_backward_pass(
    traced: tuple[RankStep, Any],
) -> None:
    memory = traced[0].memory
    assert memory.held["weights"] > 0 and memory.held["gradients"] > 0
    assert max(memory.kinds["activations"]) >= max(memory.kept.values()) > 0
    assert "optimizer" not in memory.kept
    assert all(len(values) == len(memory.seconds) for values in memory.kinds.values())


def test_hooks_name_known_places_and_no_layer_within_another() -> None:
    assert set(_NAMES.values()) <= set(PLACES) and set(PHASES.values()) <= set(PLACES)
    assert range_name("module.block.layers.11.mlp.router") == "decoder.router"
    assert range_name("module.block.layers.0.self_attention.linear_qkv.adapter") == ""
    assert range_name("encoder.encoder.layers.3.self_attn.q_proj") == "vision.linear"


@pytest.mark.parametrize("name", ["memory_steps", "nvtx_steps"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(name: str) -> None:
    run = tiny_run(training={"profiler": ProfilerConfig(**{name: (3,)})})
    with pytest.raises(UserError, match=rf"training\.profiler\.{name}.*empty list on a CPU"):
        StepProfiler(run, None, 0, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trace_steps": (0,)}, "trace_steps: got .* expected steps of 1 or more"),
        ({"ranks": (-1,)}, "ranks: got .* expected ranks of 0 or more"),
        ({"trace_steps": (2, 3), "nvtx_steps": (3,)}, r"not \[3\]"),
    ],
)
def test_steps_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ProfilerConfig(**settings)


def test_settings_name_steps_and_ranks_in_a_list() -> None:
    run = tiny_run().with_overrides(
        ["training.profiler.trace_steps=3,5", "training.profiler.ranks=[]"]
    )
    assert asdict(run.training.profiler)["trace_steps"] == (3, 5)
    assert run.training.profiler.is_for(7) and not ProfilerConfig().is_for(7)
