# SPDX-License-Identifier: Apache-2.0
"""A run takes the adapters of a checkpoint only if they are its own."""

from pathlib import Path

import pytest

from megatron_keye.checkpoint.adapters import check_adapters, shapes_with_adapters
from megatron_keye.checkpoint.continuation import check_continues
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_run

SAVED = ["training.lora.rank=4", "training.lora.targets=attention,projector"]
NAMES = ["decoder.output_layer.weight", "vision.projector.linear_1.lora_a"]
OTHERS: dict[str, list[str]] = {
    "none": [],
    "another rank": ["training.lora.rank=8", SAVED[1]],
    "another alpha": [*SAVED, "training.lora.alpha=4"],
    "other targets": SAVED[:1],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(tiny_run().with_overrides(SAVED).to_json())
    return tmp_path


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_other_adapters_are_refused_with_the_advice_to_merge(
    settings: list[str], folder: Path
) -> None:
    run = tiny_run().with_overrides(settings)
    for check in (
        lambda: check_adapters(folder, NAMES, run),
        lambda: check_continues(folder, run),
    ):
        with pytest.raises(UserError, match="merge them into the weights") as refusal:
            check()
        assert "\n" not in str(refusal.value)


def test_the_same_adapters_are_taken_in_any_order(folder: Path) -> None:
    targets = "training.lora.targets=projector,attention"
    run = tiny_run().with_overrides([SAVED[0], targets])
    check_adapters(folder, NAMES, run)
    check_continues(folder, run)


def test_a_run_with_adapters_takes_weights_without(tmp_path: Path) -> None:
    run = tiny_run().with_overrides(SAVED)
    check_adapters(tmp_path, NAMES[:1], run)
    assert not [name for name in shapes_with_adapters(run, NAMES[:1]) if "lora" in name]


def test_adapters_without_their_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json: cannot be read"):
        check_adapters(tmp_path, NAMES, tiny_run().with_overrides(SAVED))


def test_a_run_that_adds_adapters_does_not_continue_one_without(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(tiny_run().to_json())
    with pytest.raises(UserError, match=r"training.lora.rank=0.*training.checkpoint.weights="):
        check_continues(tmp_path, tiny_run().with_overrides(SAVED))
