# SPDX-License-Identifier: Apache-2.0
"""What another run left is set aside under a number: a whole folder, or later steps."""

from pathlib import Path

import pytest

from megatron_keye.checkpoint.folders import newest_checkpoint
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.checkpoint.retention import prune
from megatron_keye.checkpoint.run_lock import LOCK, RunLock
from megatron_keye.checkpoint.set_aside import set_aside
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_run

LEFT = {
    "checkpoints": "checkpoints/step-00000001/.metadata",
    "an unfinished checkpoint": "checkpoints/step-00000001.partial/.metadata",
    "events alone": "events/events.out.tfevents.1",
    "settings alone": "run.json",
}


def run_in(folder: Path, *settings: str) -> RunConfig:
    return tiny_run().with_overrides([f"output_dir={folder}", *settings])


def locked(run: RunConfig) -> RunLock:
    lock = RunLock(run.folder, run.training.checkpoint.job)
    lock.take()
    return lock


def checkpoint(run: RunConfig, step: int) -> Path:
    folder = run.folder / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.to_json())
    write_manifest(folder, {})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_a_run_that_begins_moves_what_earlier_ones_left(left: str, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for number in (1, 2):
        (run.folder / left).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / left).touch()
        lock = locked(run)
        # Another run's checkpoint is continued in this run's own, new folder.
        set_aside(run, lock, continued=tmp_path / "other" / "checkpoints" / "step-00000002")
        assert names(run.folder) == [LOCK]
        lock.check()
        assert (tmp_path / f"tiny.{number}" / left).exists()
        assert not (tmp_path / f"tiny.{number}" / LOCK).exists()
        lock.release()
        assert not run.folder.exists(), "an empty folder stays behind"


def test_a_folder_without_a_trace_of_a_run_stays(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    run.folder.mkdir()
    (run.folder / "console.log").touch()
    set_aside(run, locked(run), continued=None)
    assert (run.folder / "console.log").exists()


def test_steps_behind_the_one_that_continues_are_set_aside_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_in(tmp_path)
    one, two, three = (checkpoint(run, step) for step in (1, 2, 3))
    for export in ("exports/step-00000002", "exports/step-00000003"):
        (run.folder / export).mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 3}\n')
    lock = locked(run)
    set_aside(run, lock, continued=three)
    assert not caplog.records and names(tmp_path) == ["tiny"]
    set_aside(run, lock, continued=two)
    assert names(run.folder / "checkpoints") == [one.name, two.name]
    assert names(run.folder / "checkpoints.1") == ["metrics.jsonl", three.name]
    assert (names(run.folder / "exports"), names(run.folder / "exports.1")) == (
        [two.name],
        [three.name],
    )
    assert f"{three}: is now {run.folder / 'checkpoints.1' / three.name}" in caplog.text
    # What was set aside can be continued too; then nothing of the other line is in its way.
    set_aside(run, lock, continued=run.folder / "checkpoints.1" / three.name)
    assert names(run.folder / "checkpoints") == []
    assert names(run.folder / "checkpoints.2") == ["metrics.jsonl", one.name, two.name]


def test_what_is_saved_after_an_older_step_is_the_newest(tmp_path: Path) -> None:
    run = run_in(tmp_path, "training.checkpoint.keep=2")
    one, *_ = (checkpoint(run, step) for step in (1, 5, 6))
    set_aside(run, locked(run), continued=one)
    two = checkpoint(run, 2)
    prune(run.folder / "checkpoints", run.training.checkpoint, kept_too=one)
    assert newest_checkpoint(run.folder) == two


def test_a_run_that_another_one_overtakes_while_it_begins_is_refused(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    lock = locked(run)
    (run.folder / LOCK).write_text("{}")
    with pytest.raises(UserError, match=r"is held by nobody, expected this run, process \d+ on"):
        lock.check()
    lock.release()
    assert (run.folder / LOCK).exists()
