# SPDX-License-Identifier: Apache-2.0
"""Every number of a run refuses what cannot be meant, by its name."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_keye.config import RunConfig
from megatron_keye.config.check import check_numbers
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_run

ZERO_MEANS_SOMETHING = {
    "model.vision.num_packing_positions",
    "model.decoder.experts.balance_loss_weight",
    *(f"model.{name}_token_id" for name in ("image", "video", "vision_start", "vision_end")),
    *("data.frames.max_seconds", "data.decode.num_threads", "data.remote.num_retries"),
    *(f"parallel.decoder.{place}_stage_layers" for place in ("first", "last")),
    *(f"rollout.{name}" for name in ("tensor", "expert", "cache_tokens", "temperature", "top_k")),
    *("parallel.vision.num_ranks", "parallel.vision.shared_micro_batches"),
    "parallel.vision.attention_break_even_patches",
    "parallel.vision.max_ahead_mebibytes",
    *("training.stop_after_step", "training.dense_up_to", "training.indexer_loss_weight"),
    *("training.seed", "training.device_peak_tflops", "training.lora.rank"),
    *(f"training.checkpoint.{name}" for name in ("interval_steps", "keep", "keep_every_steps")),
    *(f"training.checkpoint.{name}" for name in ("export_every", "keep_exports")),
    *(f"training.optimizer.{name}_steps" for name in ("warmup", "decay")),
    *(f"training.optimizer.{name}" for name in ("min_learning_rate", "weight_decay")),
    *(f"training.optimizer.{name}" for name in ("beta1", "beta2", "clip_gradient_norm")),
    "training.optimizer.offload",
    *(f"training.validation.{name}" for name in ("interval_steps", "num_rows")),
    *(f"training.evaluation.{name}" for name in ("interval_steps", "num_questions")),
    *(f"training.health.{name}" for name in ("spike_score", "rerun_tolerance")),
    *("training.validation.patience", "training.validation.min_delta", "training.epochs"),
    *(f"post_training.{name}" for name in ("format_weight", "max_failed_rewards")),
    *("training.hang_minutes", "training.logging.straggler_steps"),
}


def numbers(tree: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path + name


NUMBERS = list(numbers(json.loads(tiny_run().to_json())))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_cannot_be_meant_is_refused_by_name(name: str) -> None:
    zero = [] if name in ZERO_MEANS_SOMETHING else ["0"]
    for value in ("NaN", "Infinity", "-Infinity", "-1", *zero):
        with pytest.raises(UserError) as error:
            tiny_run().with_overrides([f"{name}={value}"])
        assert str(error.value).startswith(f"{name}: got "), error.value


@pytest.mark.parametrize("name", sorted(ZERO_MEANS_SOMETHING))
def test_zero_is_accepted_where_it_means_something(name: str) -> None:
    assert isinstance(tiny_run().with_overrides([f"{name}=0"]), RunConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.vision_end_token_id=99999",
            "model.vision_end_token_id: got 99999, expected an id",
        ),
        ("model.vision_start_token_id=91", "an id of its own, but image_token_id"),
        ("model.decoder.rope_sections=[-2,2,8]", "three numbers of 0 or more whose sum"),
        ("training.seed=4294967296", "training.seed: got 4294967296, expected at most 4294967295"),
        ("data.frames.frames_per_second=" + "9" * 400, "9, expected a number below 1e308"),
        (
            "parallel.vision.shared_micro_batches=1",
            "parallel.vision.shared_micro_batches: got 1, expected 0, since "
            "parallel.vision.placement is 'colocated'",
        ),
        ("name=", "name: got '', expected the name of a folder"),
        ("name=..", "name: got '..'"),
        ("name=a/b", "name: got 'a/b'"),
        ("data.samples=", "data.samples: got ''"),
        ("data.tokenizer=", "data.tokenizer: got ''"),
    ],
)
def test_other_values_that_cannot_be_meant_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_run().with_overrides([override])
    assert message in str(error.value)


def test_at_most_half_of_the_micro_batches_are_shared() -> None:
    assert tiny_run(vision_ranks=1, shared_micro_batches=2).rows_per_replica == 4
    with pytest.raises(UserError, match="shared_micro_batches: got 3, expected at most half of"):
        tiny_run(vision_ranks=1, shared_micro_batches=3)


@dataclass(frozen=True)
class Section:
    count: int = 1
    share: float = 0.5


@pytest.mark.parametrize("section", [Section(count=True), Section(count=1.0), Section(share="1")])  # type: ignore[arg-type]
def test_a_recipe_in_python_gives_numbers_of_the_right_type(section: Section) -> None:
    with pytest.raises(UserError, match=r"x\.(count|share): got"):
        check_numbers(section, "x", above_zero="count share")


def test_a_number_without_a_range_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="share"):
        check_numbers(Section(), "x", above_zero="count")
