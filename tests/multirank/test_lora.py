# SPDX-License-Identifier: Apache-2.0
"""Adapters: what is frozen stays, every grid trains them alike, and checkpoints carry them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.checkpoint.convert.convert import Options, hf_to_native, native_to_hf
from megatron_keye.checkpoint.convert.to_peft import ADAPTER, ADAPTER_CONFIG, native_to_peft
from megatron_keye.checkpoint.hf.safetensors_index import open_folder, read_header
from megatron_keye.config import ExpertsConfig, OptimizerConfig, RunConfig
from megatron_keye.config.lora import TARGETS, LoraConfig, is_adapter
from megatron_keye.errors import UserError
from megatron_keye.estimate.parameters import decoder_parameters, vision_parameters
from megatron_keye.verify.one_process import OneProcessModel
from tests.support.numerics import make_tensor
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import (
    Trained,
    assert_same_metrics,
    assert_same_training,
    build_step,
    let_go,
    train,
)

ALL = LoraConfig(rank=4, alpha=8.0, targets=tuple(TARGETS))
BATCHES = [mixed_rows(step) for step in range(5)]
UNSHARED = replace(tiny_run().training.optimizer, distributed=False)
GRIDS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "context, recomputed": {"context": 2, "training": {"recompute": "selective"}},
    "dedicated vision": {"vision_ranks": 1},
    "data, expert": {"data": 2, "expert": 2, "training": {"optimizer": UNSHARED}},
    "tensor, expert": {"tensor": 2, "expert": 2},
}


def adapted(lora: LoraConfig = ALL, **settings: Any) -> RunConfig:
    training = {"lora": lora} | settings.pop("training", {})
    return tiny_run(training=training, **settings)


def checkpoint_in(folder: Path, step: int) -> Path:
    return folder / "tiny" / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """Return initial weights, and their checkpoint."""
    folder = tmp_path_factory.mktemp("drawn")
    return train(adapted(), [], save_to=folder), checkpoint_in(folder, 0)


@pytest.fixture(scope="module")
def one_rank() -> Trained:
    return train(adapted(), BATCHES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a run on two ranks after two steps."""
    folder = tmp_path_factory.mktemp("saved")
    run = adapted(tensor=2, expert=2, training={"optimizer": UNSHARED})
    train(run, BATCHES[:2], save_to=folder)
    return checkpoint_in(folder, 2)


def test_only_adapters_and_indexers_change(drawn: tuple[Trained, Path], one_rank: Trained) -> None:
    first = drawn[0]
    learning = {name for name in first.weights if is_adapter(name) or ".indexer." in name}
    assert one_rank.changed(first) == learning
    assert len({name for name in learning if is_adapter(name)}) == 2 * (2 + 2 + 2 + 2 * 6)


@pytest.mark.parametrize("settings", GRIDS.values(), ids=GRIDS)
def test_two_ranks_train_as_one(settings: dict[str, Any], one_rank: Trained) -> None:
    assert_same_training(train(adapted(**settings), BATCHES), one_rank)


def test_weights_begin_as_those_of_a_run_without_adapters(drawn: tuple[Trained, Path]) -> None:
    base = train(tiny_run(), []).weights
    first = drawn[0].weights
    assert {name for name in first if not is_adapter(name)} == base.keys()
    assert not [name for name, weight in base.items() if not torch.equal(weight, first[name])]
    assert not any(weight.any() for name, weight in first.items() if name.endswith("lora_b"))


CONTINUED: dict[str, dict[str, Any]] = {"one rank": {}, "pipeline": {"pipeline": 2}}


@pytest.mark.parametrize("degrees", CONTINUED.values(), ids=CONTINUED)
def test_a_run_continues_on_another_grid(
    degrees: dict[str, int], saved: Path, one_rank: Trained
) -> None:
    continued = train(adapted(**degrees), BATCHES[2:], load_from=saved)
    assert_same_metrics(continued.metrics, one_rank.metrics[2:])


def test_weights_with_adapters_begin_a_run_that_has_the_same(saved: Path) -> None:
    begun = train(adapted(training={"seed": 5}), [], weights_from=saved)
    assert not begun.changed(train(adapted(), [], load_from=saved))


def test_weights_without_adapters_begin_a_run_with_them(tmp_path: Path) -> None:
    base = train(tiny_run(), [], save_to=tmp_path)
    begun = train(adapted(training={"seed": 5}), [], weights_from=checkpoint_in(tmp_path, 0))
    assert not [n for n, w in base.weights.items() if not torch.equal(w, begun.weights[n])]
    assert any(weight.any() for n, weight in begun.weights.items() if n.endswith("lora_a"))


def test_merged_weights_are_those_of_the_base_plus_what_the_adapter_export_says(
    drawn: tuple[Trained, Path], saved: Path, tmp_path: Path
) -> None:
    native_to_hf(drawn[1], tmp_path / "base", Options(), layout="per-expert")
    native_to_hf(saved, tmp_path / "merged", Options(), layout="per-expert")
    native_to_peft(saved, tmp_path / "adapter", layout="per-expert")
    parts = {n: e.read() for n, e in read_header(tmp_path / "adapter" / ADAPTER).items()}
    config = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    merged = open_folder(tmp_path / "merged")
    num_adapted, num_indexers = 0, 0
    for name, entry in open_folder(tmp_path / "base").items():
        expected, module = entry.read().double(), name.removesuffix(".weight")
        prefix = f"base_model.model.{module}."
        is_adapted = f"{prefix}lora_A.weight" in parts
        assert (
            bool(re.fullmatch(config["target_modules"], module)) == is_adapted or ".bias" in name
        )
        if is_adapted:
            b, a = (parts.pop(f"{prefix}lora_{each}.weight").double() for each in "BA")
            expected = expected + scale * b @ a
            num_adapted += 1
        elif config["modules_to_save"][0] in name:
            expected = parts.pop(f"base_model.model.{name}").double()
            num_indexers += 1
        torch.testing.assert_close(merged[name].read().double(), expected, rtol=0, atol=1e-6)
    assert not parts, "the export has tensors of no module"
    assert num_adapted == 4 * (4 + 3 * 4) + 2 + 2 * 6 and num_indexers == 4 * 5


def test_adapters_of_fused_experts_have_no_name_in_peft(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add --expert-layout per-expert .* leave --adapter out"):
        native_to_peft(saved, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_merged_weights_compute_what_the_adapters_did(
    saved: Path, one_rank: Trained, tmp_path: Path
) -> None:
    native_to_hf(saved, tmp_path / "hf", Options())
    hf_to_native(tmp_path / "hf", tmp_path / "native", tiny_run(), Options())
    (metrics,) = train(tiny_run(), BATCHES[2:3], weights_from=tmp_path / "native").metrics
    assert metrics.loss == pytest.approx(one_rank.metrics[2].loss, rel=2e-5)
    assert metrics.indexer_kl == pytest.approx(one_rank.metrics[2].indexer_kl, rel=2e-5)


def exact(lora: LoraConfig | None) -> RunConfig:
    """Return a run in float64, which has no balancing loss, without clipping."""
    experts = ExpertsConfig(
        num_experts=4, num_experts_per_token=2, intermediate_size=24, balance_loss_weight=0.0
    )
    training = {"precision": "fp64", "optimizer": OptimizerConfig(clip_gradient_norm=0.0)}
    training |= {} if lora is None else {"lora": lora}
    return tiny_run(model=tiny_model(experts=experts), training=training)


def test_gradients_are_those_of_a_dense_change_of_the_weights() -> None:
    """dL/dA = scale B^T dL/dW and dL/dB = scale dL/dW A^T, with dL/dW at W + scale B A."""
    ((with_adapters, adapters),) = run_on_ranks(1, _gradients, exact(ALL).to_json(), None)
    ((dense, _),) = run_on_ranks(1, _gradients, exact(None).to_json(), adapters)
    linears = [name.removesuffix("lora_a") for name in adapters if name.endswith("lora_a")]
    assert len(linears) == 4 * (2 + 2) + 2 + 2 * 6
    for linear in linears:
        a, b = adapters[linear + "lora_a"], adapters[linear + "lora_b"]
        of_weight = dense[linear + "weight"]
        expected = ALL.scale * b.mT @ of_weight, ALL.scale * of_weight @ a.mT
        for name, gradient in zip(("lora_a", "lora_b"), expected, strict=True):
            got = with_adapters[linear + name]
            torch.testing.assert_close(got, gradient, rtol=1e-8, atol=1e-12, msg=linear + name)


def _gradients(
    run_json: str, adapters: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of a step by parameter, and the adapters.

    Args:
        run_json: A run on one rank. If it has adapters, their B are filled first.
        adapters: What to add to the weights of a run without adapters.
    """
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    parameters = {
        f"{index}.{name}": parameter
        for index, wrapped in enumerate(model.wrapped())
        for name, parameter in wrapped.named_parameters()
    }
    with torch.no_grad():
        for number, (name, parameter) in enumerate(parameters.items()):
            linear = name.removesuffix("weight")
            if name.endswith("lora_b"):
                parameter.copy_(make_tensor(*parameter.shape, seed=number) * 0.1)
            elif adapters is not None and linear + "lora_a" in adapters:
                parameter += ALL.scale * adapters[linear + "lora_b"] @ adapters[linear + "lora_a"]
    held = {n: p.detach().clone() for n, p in parameters.items() if is_adapter(n)}
    step(BATCHES[0], 0)
    gradients = {n: p.main_grad.clone() for n, p in parameters.items() if p.requires_grad}
    let_go(model)
    return gradients, held


def test_a_verification_does_not_leave_adapters_out(saved: Path) -> None:
    assert "merge them into the weights" in run_on_ranks(1, _refusal_to_verify, saved)[0]


def _refusal_to_verify(native: Path) -> str:
    with pytest.raises(UserError) as refusal:
        OneProcessModel(tiny_model(), torch.device("cpu"), "fp32").load_native(native)
    return str(refusal.value)


def test_a_plan_counts_the_adapters_of_a_rank() -> None:
    run = adapted(tensor=2, expert=2)
    expected = [*decoder_parameters(run, 0), *vision_parameters(run)]
    count = sum(each.count for each in expected if each.is_adapter)
    assert run_on_ranks(2, _count_adapters, run.to_json()) == [count, count]


def _count_adapters(run_json: str) -> int:
    _, model, _, _ = build_step(RunConfig.from_json(run_json))
    named = [each for wrapped in model.wrapped() for each in wrapped.named_parameters()]
    count = sum(parameter.numel() for name, parameter in named if is_adapter(name))
    let_go(model)
    return count
