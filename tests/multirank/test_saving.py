# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are written beside training; whole ones are taken, and no others are there."""

import errno
import logging
import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from megatron_keye.checkpoint import one_save
from megatron_keye.checkpoint.saver import Saver
from megatron_keye.checkpoint.selection import choose_checkpoint
from megatron_keye.checkpoint.training_checkpoint import Progress, begin_save, save
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from tests.support.ranks import run_on_ranks
from tests.support.saved import make_whole
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import build_step, let_go


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Hold the writing of files back until the event is set."""
    go_on, write = threading.Event(), one_save.write_parts

    def later(*arguments: Any) -> Any:
        assert go_on.wait(60)
        return write(*arguments)

    one_save.write_parts = later
    try:
        yield go_on
    finally:
        go_on.set()
        one_save.write_parts = write


def test_training_on_beside_a_save_changes_nothing_of_it(tmp_path: Path) -> None:
    run_on_ranks(2, _save_and_train_on, str(tmp_path))
    plain, beside = (tmp_path / name / "tiny" / "checkpoints" for name in ("plain", "beside"))
    names = sorted(path.name for path in beside.iterdir())
    assert names == ["step-00000001", "step-00000002"]
    for rank in (0, 1):
        file = f"step-00000001/__{rank}_0.distcp"
        assert (beside / file).read_bytes() == (plain / file).read_bytes()


def _save_and_train_on(folder: str) -> None:
    run = tiny_run(data=2)
    run = replace(run, output_dir=f"{folder}/beside")
    grid, model, optimizer, step = build_step(run)
    step(mixed_rows(0), 0)
    progress = Progress(step=1, updates=1, data={})
    save(replace(run, output_dir=f"{folder}/plain"), model, optimizer, grid, progress)
    before = _processes_and_folders()
    saver, checkpoints = Saver(run), run.folder / "checkpoints"
    with held_back() as go_on:
        begin_save(saver, run, model, optimizer, grid, progress)
        step(mixed_rows(1), 1)
        assert [path.suffix for path in checkpoints.iterdir()] == [".partial"]
        assert saver.take_saved() == []
        go_on.set()
    # The second save waits for the first.
    begin_save(saver, run, model, optimizer, grid, replace(progress, step=2))
    saver.wait()
    saved = saver.take_saved()
    assert [each.folder.name for each in saved] == ["step-00000001", "step-00000002"]
    assert all(0 < each.pause_seconds < each.seconds for each in saved)
    saver.close()
    assert _processes_and_folders() <= before
    let_go(model)


def _processes_and_folders() -> set[object]:
    """What this process has started, and made for what it starts."""
    children = {child.pid for child in psutil.Process().children()}
    return children | {multiprocessing.current_process()._config.get("tempdir")}


def test_all_ranks_refuse_a_save_that_one_could_not_write(tmp_path: Path) -> None:
    errors = run_on_ranks(2, _save_with_a_full_disk, str(tmp_path))
    assert errors[0] == errors[1]
    assert "rank 1" in errors[0] and "got no space left on the device" in errors[0]
    checkpoints = tmp_path / "tiny" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]


def _save_with_a_full_disk(folder: str) -> str:
    run = replace(tiny_run(data=2), output_dir=folder)
    grid, model, optimizer, step = build_step(run)
    progress = Progress(step=1, updates=0, data={})
    save(run, model, optimizer, grid, progress)
    saver, write = Saver(run), one_save.write_parts
    partial = run.folder / "checkpoints" / "step-00000002.partial"

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))

    try:
        if grid.rank == 1:
            one_save.write_parts = fail
        begin_save(saver, run, model, optimizer, grid, replace(progress, step=2))
        saver.wait()
    except UserError as error:
        assert saver.has_failed
        return str(error)
    finally:
        one_save.write_parts = write
        saver.close()
        let_go(model)
    return "nothing"


DAMAGES = {
    "no manifest": ("manifest.json", None),
    "metadata.json is cut short": ("metadata.json", b"{"),
    "run.json is empty": ("run.json", b""),
    "no .metadata": (".metadata", None),
    "a flipped bit": ("__0_0.distcp", b"__0_0.distcp og step-00000009\n"),
    "a file in its place": ("", b""),
    "an empty folder in its place": ("", None),
}


def test_all_ranks_take_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    runs = []
    for name, (file, content) in DAMAGES.items():
        run = replace(tiny_run(), name=name.replace(" ", "_"), output_dir=str(tmp_path))
        run = run.with_overrides(["training.checkpoint.resume=auto"])
        make_whole(run.folder / "checkpoints" / "step-00000003")
        newest = run.folder / "checkpoints" / "step-00000009"
        make_whole(newest)
        if not file:
            newest.rename(newest.with_name("moved"))
        if content is not None:
            (newest / file).write_bytes(content)
        elif file:
            (newest / file).unlink()
        else:
            newest.mkdir()
        explicit = run.with_overrides([f"training.checkpoint.resume={newest}"])
        runs += [run.to_json(), explicit.to_json()]
    first, second = run_on_ranks(2, _choices, runs)
    assert first[0] == second[0] and not second[1]
    for number, (name, (file, _)) in enumerate(DAMAGES.items()):
        taken, refused = first[0][2 * number : 2 * number + 2]
        assert taken.endswith("step-00000003"), name
        assert f"step-00000009{'/' * bool(file)}{file}" in refused or file == "manifest.json"
        assert first[1][number] == f"step-00000009 is skipped: {refused}"


def test_without_a_whole_checkpoint_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    run = replace(tiny_run(), output_dir=str(tmp_path))
    run = run.with_overrides(["training.checkpoint.resume=auto"])
    partial = run.folder / "checkpoints" / "step-00000007.partial"
    partial.mkdir(parents=True)
    assert run_on_ranks(2, _choices, [run.to_json()])[1] == (["None"], [])
    assert not partial.exists(), "what a killed save left is removed"
    (run.folder / "checkpoints" / "step-00000007").mkdir()
    other = run.with_overrides([f"training.checkpoint.resume={tmp_path}"])
    choices, _ = run_on_ranks(2, _choices, [run.to_json(), other.to_json()])[1]
    assert "no whole checkpoint" in choices[0] and "step-00000007: got no manifest" in choices[0]
    assert "expected the folder of a complete checkpoint" in choices[1]


def _choices(runs: list[str]) -> tuple[list[str], list[str]]:
    """Return what each run continues, or the error, and what was logged."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_keye.checkpoint.selection")
    logger.addHandler(handler)
    choices = []
    for run in runs:
        try:
            choices.append(str(choose_checkpoint(RunConfig.from_json(run))))
        except UserError as error:
            choices.append(str(error))
    logger.removeHandler(handler)
    return choices, said
