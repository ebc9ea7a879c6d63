# SPDX-License-Identifier: Apache-2.0
"""Settings of training that can't be meant are refused by name when they are made."""

import re
from typing import Any

import pytest

from megatron_keye.config import OptimizerConfig
from megatron_keye.config.parts import PARTS
from tests.support.tiny import tiny_run

NAN, INFINITY = float("nan"), float("inf")
NUMBERS: dict[str, tuple[float, ...]] = {
    "learning_rate": (0.0, -1.0, NAN, INFINITY),
    "min_learning_rate": (-1e-9, 2e-4, NAN, INFINITY),
    "warmup_steps": (-3,),
    "weight_decay": (-0.1, NAN, INFINITY),
    "beta1": (-0.1, 1.0, NAN, INFINITY),
    "beta2": (-0.1, 1.0, NAN, INFINITY),
    "epsilon": (0.0, -1.0, NAN, INFINITY),
    "clip_gradient_norm": (-1.0, NAN, INFINITY),
    "offload": (-0.1, 1.1, NAN, INFINITY),
    **{f"{part}_rate_multiplier": (0.0, -1.0, NAN, INFINITY) for part in PARTS},
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values]
)
def test_numbers_of_the_optimizer_that_make_no_sense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^training\.optimizer\.{name}: got {value}, expected"):
        OptimizerConfig(**{"learning_rate": 1e-4, name: value})


def test_every_number_of_the_optimizer_is_checked() -> None:
    numbers = {
        name for name, value in vars(OptimizerConfig()).items() if type(value) in (int, float)
    }
    assert numbers == NUMBERS.keys() | {"decay_steps"}


def test_numbers_at_the_bounds_are_taken() -> None:
    OptimizerConfig(
        min_learning_rate=1e-4, weight_decay=0.0, beta1=0.0, beta2=0.0, clip_gradient_norm=0.0
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("schedule", {"schedule": "step"}),
        ("decay_steps", {"decay_steps": 10}),
        ("decay_steps", {"decay_steps": -1, "schedule": "linear"}),
        ("decay_steps", {"schedule": "warmup_stable_decay"}),
        ("min_learning_rate", {"schedule": "constant", "min_learning_rate": 1e-5}),
    ],
)
def test_lengths_that_the_schedule_does_not_have(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^training\.optimizer\.{name}: got "):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        ("training.indexer_loss_weight=NaN",),
        ("training.indexer_loss_weight=Infinity",),
        ("training.indexer_loss_weight=-1",),
        ("training.indexer_loss_weight=0", "training.phase=indexer_warmup"),
        ("training.health.max_bad_steps=0",),
    ],
    ids=",".join,
)
def test_a_run_that_could_not_learn_is_refused(settings: tuple[str, ...]) -> None:
    name, _, value = settings[0].partition("=")
    said = rf"^{re.escape(name)}: got {value.lower()[:3]}"
    with pytest.raises(ValueError, match=said):
        tiny_run().with_overrides(list(settings))


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("recompute", {"recompute": "some"}),
        ("keeps_in_host_memory", {"keeps_in_host_memory": True}),
        ("keeps_in_host_memory", {"keeps_in_host_memory": True, "recompute": "experts"}),
    ],
)
def test_recomputation_that_there_is_not_is_refused(name: str, training: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^training\.{name}: got "):
        tiny_run(training=training)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("optimizer.offload", ["optimizer.offload=1.5"]),
        ("optimizer.moments", ["optimizer.moments=fp16"]),
        ("optimizer.distributed", ["optimizer.offload=0.5", "optimizer.distributed=false"]),
        ("optimizer.distributed", ["optimizer.moments=bf16", "optimizer.distributed=false"]),
        # 0.999 times a moment rounds to the moment in bf16.
        ("optimizer.beta2", ["optimizer.moments=bf16", "optimizer.beta2=0.999"]),
        ("precision", ["optimizer.offload=1", "precision=fp64"]),
    ],
)
def test_state_that_cannot_be_kept_so_is_refused(name: str, settings: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"^training\.{re.escape(name)}: got "):
        tiny_run().with_overrides([f"training.{setting}" for setting in settings])
