# SPDX-License-Identifier: Apache-2.0
"""A run whose checkpoints the disk would not take is refused before it begins, in numbers."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_keye.config import RunConfig
from megatron_keye.estimate.disk_room import check_room, num_held, saved_bytes
from megatron_keye.files.disk import DiskError
from megatron_keye.recipes import load_recipe
from tests.support.tiny import tiny_run

GIB = 2**30
HELD: list[tuple[dict[str, Any], int]] = [
    ({"interval_steps": 10, "keep": 2}, 3),
    ({"interval_steps": 10, "keep": 0}, 10),
    ({"interval_steps": 30, "keep": 0}, 4),
    ({"interval_steps": 50, "keep": 2}, 2),
    ({"interval_steps": 0, "keep": 2}, 1),
    ({"interval_steps": 0, "keep": 2, "saves_last": False}, 0),
]


def with_checkpoints(run: RunConfig, **settings: Any) -> RunConfig:
    checkpoint = replace(run.training.checkpoint, **settings)
    return replace(run, training=replace(run.training, steps=100, checkpoint=checkpoint))


@pytest.mark.parametrize(("settings", "held"), HELD, ids=[str(each) for each, _ in HELD])
def test_a_checkpoint_more_than_is_kept_is_there_while_it_is_written(
    settings: dict[str, Any], held: int
) -> None:
    assert num_held(with_checkpoints(tiny_run(), **settings)) == held


def test_the_sentence_has_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_recipe("keye_30b_a3b")(num_ranks=512, has_gpu=True)
    run = replace(with_checkpoints(run, interval_steps=10), output_dir=str(tmp_path))
    free = SimpleNamespace(free=1300 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    check_room(run)
    free.free = 1000 * GIB
    with pytest.raises(DiskError) as refusal:
        check_room(run)
    assert str(refusal.value).startswith(f"{run.folder}: got 1,000 GiB of free space, expected ")
    assert "for 3 checkpoints of 406 GiB (" in str(refusal.value) and not list(tmp_path.iterdir())
    saved = run.folder / "checkpoints" / "step-00000010"
    saved.mkdir(parents=True)
    with (saved / "weights").open("wb") as file:
        file.truncate(400 * GIB)
    with pytest.raises(DiskError, match="3 checkpoints"):
        check_room(run)  # It is set aside when the run begins anew.
    check_room(with_checkpoints(run, interval_steps=10, resume="auto"))


def test_a_run_that_has_ended_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_checkpoints(replace(tiny_run(), output_dir=str(tmp_path)), resume="auto")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    (run.folder / "checkpoints" / "step-00000099").mkdir(parents=True)
    with pytest.raises(DiskError, match="got 0 GiB of free space"):
        check_room(run)
    (run.folder / "checkpoints" / "step-00000100").mkdir()
    check_room(run)


def test_state_in_main_memory_is_saved_too() -> None:
    run = load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True)
    away = run.with_overrides(["training.optimizer.offload=1"])
    assert saved_bytes(away) == saved_bytes(run)
    _, halved = saved_bytes(run.with_overrides(["training.optimizer.moments=bf16"]))
    assert halved == pytest.approx(saved_bytes(run)[1] * 10 / 14)
