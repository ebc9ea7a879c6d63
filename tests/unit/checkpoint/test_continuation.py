# SPDX-License-Identifier: Apache-2.0
"""What a run changes when it continues a checkpoint is refused by name, said, or no matter."""

import json
import logging
from pathlib import Path

import pytest

from megatron_keye.checkpoint import continuation
from megatron_keye.checkpoint.continuation import Change, change_of, check_continues
from megatron_keye.config import RunConfig
from megatron_keye.config.settings import read_sections
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a checkpoint of `tiny_run`, as far as its settings go."""
    (tmp_path / "run.json").write_text(tiny_run().to_json())
    return tmp_path


def continued(folder: Path, *settings: str) -> RunConfig:
    run = tiny_run().with_overrides(list(settings))
    check_continues(folder, run)
    return run


REFUSED = {
    "training.phase=indexer_warmup": "training.phase=sparse, and this run has training.phase=",
    'training.frozen=["vision"]': 'frozen=[], and this run has training.frozen=["vision"];',
    "training.precision=bf16": "training.precision=fp32, and",
    "training.seed=1": "training.seed=1234, and this run has training.seed=1;",
    "data.shuffles=false": "data.shuffles=true, and",
    "model.decoder.rope_theta=1e6": "model.decoder.rope_theta=10000.0, and",
    "model.vision_end_token_id=7": "model.vision_end_token_id=93, and",
}


@pytest.mark.parametrize(("setting", "says"), REFUSED.items(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_both_values(
    setting: str, says: str, folder: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        continued(folder, setting)
    assert says in str(refusal.value)
    assert f"training.checkpoint.weights={folder}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_size_has_no_weights_to_begin_from(folder: Path) -> None:
    with pytest.raises(UserError, match="model.decoder.num_layers=4, and .*=2; ") as refusal:
        continued(folder, "model.decoder.num_layers=2")
    assert "training.checkpoint.weights" not in str(refusal.value)


SAID = {
    "training.rows_per_step=8": "training.rows_per_step=4 -> 8",
    "training.steps=99": "training.steps=8 -> 99",
    "training.optimizer.beta1=0.8": "training.optimizer.beta1=0.9 -> 0.8",
    "training.optimizer.learning_rate=0.5": "training.optimizer.learning_rate=0.01 -> 0.5",
    "data.row_tokens=128": "data.row_tokens=64 -> 128",
    "data.frames.frames_per_second=1": "data.frames.frames_per_second=2.0 -> 1.0",
    "model.decoder.indexer.top_k=4": "model.decoder.indexer.top_k=12 -> 4",
    "training.checkpoint.weights=/a": "so training.checkpoint.weights=/a is not read",
}


@pytest.mark.parametrize(("setting", "says"), SAID.items(), ids=SAID)
def test_what_changes_training_is_said_in_one_line(
    setting: str, says: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    continued(folder, setting)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and says in record.getMessage()


def test_what_changes_nothing_is_not_mentioned(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    continued(
        folder,
        *("name=other", "output_dir=/elsewhere", "parallel.decoder.data=2"),
        *("training.optimizer.distributed=false", "training.checkpoint.keep=7"),
        *("training.stop_after_step=3", "data.decode.num_threads=2"),
    )
    assert not caplog.records


def test_parts_frozen_in_another_order_are_the_same(folder: Path) -> None:
    frozen = tiny_run().with_overrides(['training.frozen=["vision","indexer"]'])
    (folder / "run.json").write_text(frozen.to_json())
    continued(folder, 'training.frozen=["indexer","vision"]')


def test_a_new_setting_is_said_until_it_is_decided() -> None:
    assert change_of("training.invented_later") is Change.SAID
    names = [setting.name for section in read_sections() for setting in section.settings]
    # Size settings are many; none of them may slip to another decision.
    sizes = [name for name in names if name.startswith("model.vision.")]
    assert sizes and {change_of(name) for name in sizes} == {Change.REFUSED}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        (json.dumps({"nonsense": 1}), "nonsense: no such field"),
    ],
)
def test_a_checkpoint_without_its_settings_is_refused(
    content: str | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=says):
        continued(tmp_path)


def test_every_decision_is_about_a_setting_that_there_is() -> None:
    names = [setting.name for section in read_sections() for setting in section.settings]
    for decided in continuation._CHANGES:
        assert any(f"{name}.".startswith(f"{decided}.") or not decided for name in names), decided
