# SPDX-License-Identifier: Apache-2.0
"""The newest whole checkpoints stay, and those kept for good; a killed save loses none."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_keye.checkpoint import retention
from megatron_keye.checkpoint.folders import newest_checkpoint
from megatron_keye.checkpoint.retention import partial_of, prune, put_in_place, remove_leftovers
from megatron_keye.config.training import CheckpointConfig
from tests.support.saved import make_whole
from tests.support.tiny import tiny_run


def folder_of(parent: Path, step: int) -> Path:
    return parent / f"step-{step:08d}"


def steps_in(parent: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in parent.iterdir())


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (CheckpointConfig(keep=2), [2, 6, 7, 8, 9]),
        (CheckpointConfig(keep=1, keep_every_steps=3), [2, 3, 6, 7, 8, 9]),
        (CheckpointConfig(keep=0, keep_every_steps=3), list(range(1, 10))),
    ],
)
def test_damaged_checkpoints_do_not_count_and_the_best_one_stays(
    settings: CheckpointConfig, left: list[int], tmp_path: Path
) -> None:
    for step in range(1, 10):
        make_whole(folder_of(tmp_path, step))
    for newest in (8, 9):
        (folder_of(tmp_path, newest) / "run.json").unlink()
    prune(tmp_path, settings, kept_too=folder_of(tmp_path, 2))
    assert steps_in(tmp_path) == left


@pytest.mark.parametrize("killed_at", range(3))
def test_a_step_saved_again_is_never_without_a_checkpoint(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run().with_overrides([f"output_dir={tmp_path}"])
    parent = run.folder / "checkpoints"
    folder = make_whole(folder_of(parent, 5))
    make_whole(partial_of(folder))
    num_left = iter(range(killed_at, -1, -1))

    def until_killed(work: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Path) -> None:
            if next(num_left) == 0:
                raise KeyboardInterrupt
            work(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "_remove"):
            patch.setattr(retention, name, until_killed(getattr(retention, name)))
        with pytest.raises(KeyboardInterrupt):
            put_in_place(folder)
    remove_leftovers(parent)
    assert newest_checkpoint(run.folder) == folder
    assert steps_in(parent) == [5]
