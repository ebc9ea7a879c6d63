# SPDX-License-Identifier: Apache-2.0
"""environment.json says where each start of a run came from."""

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.training.provenance import commit_of, record_start
from tests.support.tiny import tiny_run

ROOT = Path(__file__).parents[3]


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(
        ["git", *identity, "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_each_start_adds_a_record(tmp_path: Path) -> None:
    run = dataclasses.replace(tiny_run(), output_dir=str(tmp_path))
    record_start(
        run, 0, ["node-1", "node-1", "node-2", "node-2"], "NVIDIA H100", Fusions(norm=True)
    )
    record_start(run, 7, ["node-3"], "CPU", PLAIN)
    first, second = json.loads((run.folder / "environment.json").read_text())
    assert first["first_step"] == 1 and second["first_step"] == 8
    assert first["hosts"] == {"node-1": 2, "node-2": 2} and second["hosts"] == {"node-3": 1}
    assert first["device"] == "NVIDIA H100" and first["grid"] == run.parallel.describe()
    assert first["versions"]["megatron-core"] == version("megatron-core")
    assert first["versions"]["torch"] == version("torch")
    assert sys.orig_argv[-1] in first["command"]
    assert first["fusions"] == ["norm"] and second["fusions"] == []
    assert first["started"] <= second["started"]


def test_the_commit_is_that_of_the_checkout_and_says_if_it_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "megatron_keye"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit_of(tmp_path) is None, "no repository"
    git(tmp_path, "init", "--quiet")
    assert commit_of(tmp_path) is None, "a repository that does not track it, as around .venv"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit
    (package / "__init__.py").write_text("changed")
    assert commit_of(tmp_path) == f"{commit}+changes"
