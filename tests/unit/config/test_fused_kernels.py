# SPDX-License-Identifier: Apache-2.0
"""A run takes the fused kernels that can run, and refuses by name those that it asks for."""

from dataclasses import fields

import pytest

from megatron_keye.config import FusionsConfig, TrainingConfig, fused_kernels
from megatron_keye.config.fused_kernels import PLAIN, Fusions, choose_fusions
from megatron_keye.config.megatron import decoder_config, output_layer_config
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_run

NAMES = [each.name for each in fields(FusionsConfig)]


def training(precision: str = "bf16", **wanted: str) -> TrainingConfig:
    return TrainingConfig(
        steps=1,
        precision=precision,  # type: ignore[arg-type]
        fusions=FusionsConfig(**(dict.fromkeys(NAMES, "auto") | wanted)),  # type: ignore[arg-type]
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_kernels, "transformer_engine_version", lambda: "2.20.2")


def test_all_run_where_transformer_engine_is(engine: None) -> None:
    taken = choose_fusions(training(), has_gpu=True, uses_transformer_engine=True)
    assert taken.names() == NAMES, "the output layer is Megatron-Core's own, which needs apex"
    fewer = training(router="off", norm="off")
    taken = choose_fusions(fewer, has_gpu=True, uses_transformer_engine=True)
    assert taken.names() == ["permutation", "swiglu", "weight_gradients"]


def test_apex_adds_weight_gradients_of_megatrons_own_layers(
    engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = choose_fusions(training(), has_gpu=True, uses_transformer_engine=False)
    assert taken.names() == ["permutation", "router", "swiglu", "norm"]
    monkeypatch.setattr(fused_kernels, "has_weight_gradient_extension", lambda: True)
    taken = choose_fusions(training(), has_gpu=True, uses_transformer_engine=False)
    assert taken.weight_gradients and taken.output_weight_gradients


def test_nothing_runs_on_a_cpu_or_in_float64(engine: None) -> None:
    assert choose_fusions(training(), has_gpu=False, uses_transformer_engine=False) == PLAIN
    wide = training("fp64")
    assert choose_fusions(wide, has_gpu=True, uses_transformer_engine=True) == PLAIN


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_asked_for_and_cannot_run_is_refused_by_name(name: str) -> None:
    wanted = training(**{name: "on"})
    with pytest.raises(UserError, match=f"^training.fusions.{name}: got 'on' without a GPU, exp"):
        choose_fusions(wanted, has_gpu=False, uses_transformer_engine=False)
    if name != "swiglu":
        with pytest.raises(UserError, match=f"{name}: got 'on' with.*to install it: "):
            choose_fusions(wanted, has_gpu=True, uses_transformer_engine=False)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.fusions\.norm: got 'yes', expected one of"):
        training(norm="yes")


def test_megatron_is_told() -> None:
    run = tiny_run()
    fusions = Fusions(swiglu=True, weight_gradients=True)
    config = decoder_config(run, on_gpu=False, fusions=fusions)
    assert config.bias_activation_fusion and config.gradient_accumulation_fusion
    assert not config.moe_permute_fusion and not config.moe_router_fusion
    assert not output_layer_config(config, fusions).gradient_accumulation_fusion
    assert config.gradient_accumulation_fusion, "only the output layer's copy differs"
