# SPDX-License-Identifier: Apache-2.0
"""A run takes the files of the checkpoint that it starts from, whichever that is."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_keye.checkpoint.convert.carried_files import CARRIED
from megatron_keye.checkpoint.export import take_carried_files
from tests.support.tiny import tiny_run


def make_checkpoint(folder: Path, name: str) -> None:
    (folder / CARRIED).mkdir(parents=True)
    (folder / CARRIED / "LICENSE").write_text(name)


@pytest.mark.parametrize(
    ("resume", "weights", "taken"),
    [
        ("", "native", "native"),
        ("", "", "older"),
        ("tiny/checkpoints/step-00000002", "native", "own"),
        ("other/checkpoints/step-00000009", "native", "other"),
    ],
)
def test_a_run_takes_the_files_of_the_checkpoint_that_it_starts_from(
    resume: str, weights: str, taken: str, tmp_path: Path
) -> None:
    run = replace(tiny_run(), output_dir=str(tmp_path))
    make_checkpoint(tmp_path / "native", "native")
    make_checkpoint(tmp_path / "other" / "checkpoints" / "step-00000009", "other")
    make_checkpoint(run.folder / "checkpoints" / "step-00000002", "own")
    make_checkpoint(run.folder, "older")
    settings = [f"training.checkpoint.weights={tmp_path / weights if weights else ''}"]
    continued = tmp_path / resume if resume else None
    take_carried_files(run.with_overrides(settings), continued)
    assert (run.folder / CARRIED / "LICENSE").read_text() == taken
