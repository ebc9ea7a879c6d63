# SPDX-License-Identifier: Apache-2.0
"""The tests of layouts on real GPUs: NCCL instead of gloo, Transformer Engine where installed."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_keye.config import FusionsConfig, RunConfig
from megatron_keye.config.backends import transformer_engine_version
from megatron_keye.config.lora import LoraConfig
from tests.support.layouts import FOUR_RANKS
from tests.support.tiny import mixed_rows, text_rows, tiny_model, tiny_run
from tests.support.train import (
    LOSS_TOLERANCE,
    Trained,
    assert_same_training,
    encoded_ahead,
    train,
    train_announced,
    without_work_ahead,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
needs_four = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="fewer than four GPUs")
needs_engine = pytest.mark.skipif(
    transformer_engine_version() is None, reason="no Transformer Engine"
)

TWO_GPUS = {
    "tensor and sequence": {"tensor": 2},
    "tensor, expert": {"tensor": 2, "expert": 2},
    "pipeline": {"pipeline": 2},
    "interleaved pipeline": {"pipeline": 2, "virtual_stages": 2},
    "context": {"context": 2},
    "data, expert": {"data": 2, "expert": 2},
    "dedicated vision": {"vision_ranks": 1},
}
FOUR_GPUS = FOUR_RANKS | {
    "tensor 4, expert 4": {"tensor": 4, "expert": 4},
    "tensor and two vision ranks": {"tensor": 2, "vision_ranks": 2},
    "pipeline and a vision rank": {"pipeline": 2, "vision_ranks": 1},
}
REPLICAS = {name: TWO_GPUS[name] for name in ("tensor and sequence", "context", "data, expert")}
UNSHARED = replace(tiny_run().training.optimizer, distributed=False)


@pytest.fixture(scope="module")
def one_gpu() -> Trained:
    return train(tiny_run(device="cuda"))


def test_one_gpu_trains_as_the_cpu(one_gpu: Trained) -> None:
    # The CPU's figures, since one process can't serve both: first and last loss of `one_rank`.
    assert one_gpu.metrics[0].loss == pytest.approx(5.124396417374001, rel=1e-5)


@needs_two
@pytest.mark.parametrize("degrees", TWO_GPUS.values(), ids=TWO_GPUS)
def test_two_gpus_train_as_one(degrees: dict[str, int], one_gpu: Trained) -> None:
    assert_same_training(train(tiny_run(device="cuda", **degrees)), one_gpu)


@needs_four
@pytest.mark.parametrize("degrees", FOUR_GPUS.values(), ids=FOUR_GPUS)
def test_four_gpus_train_as_one(degrees: dict[str, int], one_gpu: Trained) -> None:
    assert_same_training(train(tiny_run(device="cuda", **degrees)), one_gpu)


@needs_two
@pytest.mark.parametrize("degrees", REPLICAS.values(), ids=REPLICAS)
def test_two_gpus_that_do_not_share_the_optimizer_train_as_one(
    degrees: dict[str, int], one_gpu: Trained
) -> None:
    training = {"optimizer": UNSHARED}
    assert_same_training(train(tiny_run(device="cuda", training=training, **degrees)), one_gpu)


AWAY = {"half": {"offload": 0.5}, "all": {"offload": 1.0}}


@pytest.mark.parametrize("kept", AWAY.values(), ids=AWAY)
def test_state_in_main_memory_trains_as_state_on_the_gpu(
    kept: dict[str, float], one_gpu: Trained
) -> None:
    training = {"optimizer": replace(tiny_run().training.optimizer, **kept)}
    assert_same_training(train(tiny_run(device="cuda", training=training)), one_gpu)


@needs_two
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_gpus_with_state_in_main_memory_save_and_continue(
    precision: str, tmp_path: Path
) -> None:
    """Half of the state, so that weights divided among replicas have it in both places."""
    optimizer = replace(tiny_run().training.optimizer, offload=0.5)
    run = tiny_run(
        device="cuda",
        model=tiny_model(num_layers=3),
        training={"optimizer": optimizer, "precision": precision},
        context=2,
    )
    batches = [mixed_rows(step) for step in range(3)]
    whole = train(run, batches)
    train(run, batches[:2], save_to=tmp_path)
    saved = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    continued = train(run, batches[2:], load_from=saved)
    assert continued.metrics[-1].loss == pytest.approx(whole.metrics[-1].loss, rel=1e-3)


@needs_two
def test_text_alone_trains_with_an_unused_vision_gpu() -> None:
    batches = [text_rows(0), mixed_rows(1)]
    expected = train(tiny_run(device="cuda"), batches)
    assert_same_training(train(tiny_run(device="cuda", vision_ranks=1), batches), expected)


@needs_two
def test_a_frozen_vision_gpu_works_a_step_ahead() -> None:
    training = {"frozen": ("vision", "projector"), "records_timeline": True}
    run = tiny_run(device="cuda", vision_ranks=1, training=training)
    first, _, figures = train_announced(run, mixed_rows(0))
    decoder_ends = max(span.end for span in first[0] if span.name == "backward")
    assert min(span.start for span in encoded_ahead(first[1])) < decoder_ends
    _, _, expected = train_announced(without_work_ahead(run), mixed_rows(0))
    for mine, theirs in zip(figures, expected, strict=True):
        # Kernels with atomic additions keep it from being equal to the last bit.
        assert mine == pytest.approx(theirs, rel=LOSS_TOLERANCE)


@needs_two
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_distributed_optimizer_is_saved_and_continues(tmp_path: Path, precision: str) -> None:
    same: dict[str, Any] = {
        "device": "cuda",
        "model": tiny_model(num_layers=3),  # Half of its elements end inside of a weight.
        "training": {"precision": precision},
    }
    steps = [mixed_rows(step) for step in range(3)]
    run = tiny_run(data=2, expert=2, **same)
    uninterrupted = train(run, steps)
    train(run, steps[:2], save_to=tmp_path)
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    for degrees in ({"data": 2, "expert": 2}, {}):
        (got,) = train(tiny_run(**degrees, **same), steps[2:], load_from=checkpoint).metrics
        relative = LOSS_TOLERANCE if precision == "fp32" else 1e-3
        assert got.loss == pytest.approx(uninterrupted.metrics[2].loss, rel=relative)


@needs_engine
@pytest.mark.parametrize("experts", ["torch", "transformer_engine"])
def test_transformer_engine_trains_as_other_layers(experts: str, one_gpu: Trained) -> None:
    training = {"linear_layers": "transformer_engine", "expert_layers": experts}
    got = train(tiny_run(device="cuda", training=training))
    assert got.weights.keys() == one_gpu.weights.keys(), "checkpoint keys differ"
    # Its matrix products round float32 to TF32, 10 bits of mantissa.
    assert got.metrics[0].loss == pytest.approx(one_gpu.metrics[0].loss, rel=1e-3)


FUSED = [each.name for each in fields(FusionsConfig)]


@pytest.fixture(scope="module")
def unfused() -> Trained:
    return train(with_fusions())


def with_fusions(*names: str) -> RunConfig:
    """Return a run that takes these fused kernels and no other."""
    wanted = {name: "on" if name in names else "off" for name in FUSED}
    fusions = FusionsConfig(**wanted)  # type: ignore[arg-type]
    training = {"linear_layers": "transformer_engine", "fusions": fusions}
    return tiny_run(device="cuda", training=training)


@needs_engine
@pytest.mark.parametrize("names", [*([name] for name in FUSED), FUSED], ids=[*FUSED, "all"])
def test_fused_kernels_train_as_their_plain_forms(names: list[str], unfused: Trained) -> None:
    got = train(with_fusions(*names))
    assert got.metrics[0].loss == pytest.approx(unfused.metrics[0].loss, rel=1e-5)
    for mine, theirs in zip(got.metrics, unfused.metrics, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-3)
        assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-2)


@needs_engine
@pytest.mark.parametrize("expert_layers", ["torch", "transformer_engine"])
def test_a_checkpoint_continues_with_other_expert_layers(
    expert_layers: str, tmp_path: Path
) -> None:
    steps = [mixed_rows(step) for step in range(3)]
    engine = {"precision": "bf16", "linear_layers": "transformer_engine"}
    saving, other = (
        tiny_run(device="cuda", training=engine | {"expert_layers": layers})
        for layers in ("torch", "transformer_engine")[:: 1 if expert_layers == "torch" else -1]
    )
    train(saving, steps[:2], save_to=tmp_path)
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    expected, got = (train(run, steps[2:], load_from=checkpoint) for run in (saving, other))
    assert got.metrics[0].loss == pytest.approx(expected.metrics[0].loss, rel=1e-3)
    assert got.metrics[0].gradient_norm == pytest.approx(
        expected.metrics[0].gradient_norm, rel=1e-2
    )


@needs_engine
def test_adapters_of_transformer_engine_train_as_those_of_other_layers() -> None:
    lora = LoraConfig(rank=4, alpha=8.0, targets=("attention", "experts"))
    runs = [
        tiny_run(device="cuda", training={"lora": lora, **layers})
        for layers in (
            {"linear_layers": "megatron", "expert_layers": "torch"},
            {"linear_layers": "transformer_engine", "expert_layers": "transformer_engine"},
        )
    ]
    drawn, drawn_by_engine = (train(run, []) for run in runs)
    assert not drawn_by_engine.changed(drawn)
    expected, got = (train(run) for run in runs)
    assert got.changed(drawn) == expected.changed(drawn)
    for mine, theirs in zip(got.metrics, expected.metrics, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-3)


def test_bf16_follows_fp32(one_gpu: Trained) -> None:
    got = train(tiny_run(device="cuda", training={"precision": "bf16"}))
    for mine, theirs in zip(got.metrics, one_gpu.metrics, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-2)
