# SPDX-License-Identifier: Apache-2.0
"""The tutorial, command by command as it is printed, in a fresh copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_keye.checkpoint.hf.safetensors_index import open_folder
from tests.support.doc_pages import ROOT, Block, blocks_of

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "tutorial.md"
FORMAT = ROOT / "docs" / "checkpoint_format.md"
SMALLER = {
    "training.steps=100": "training.steps=2",
    "training.steps=130": "training.steps=3",
    "step-00000130": "step-00000003",
    "max_new_tokens=40": "max_new_tokens=4",
}
"""What the test replaces, so that it takes a minute; all else runs as printed."""


def tutorial_blocks() -> list[Block]:
    blocks = [block for block in blocks_of(PAGE) if block.has_commands]
    run = [block for block in blocks if block.mark and block.mark[0] == "run"]
    assert len(run) == len(blocks) - 1, "all but the installation are run here"
    return run


def clean_clone(folder: Path) -> Path:
    """Copy the repository's files, without what was built or made in it."""
    if not (ROOT / ".git").exists():
        pytest.skip("only a clone knows its files")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if not (ROOT / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def run(script: str, clone: Path, programs: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=clone,
        env=os.environ
        | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(clone), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_the_tutorial_leads_from_videos_to_an_exported_model(tmp_path: Path) -> None:
    clone, programs = clean_clone(tmp_path / "clone"), tmp_path / "programs"
    programs.mkdir()
    program = programs / "megatron-keye"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m megatron_keye "$@"\n')
    program.chmod(0o755)
    text = "".join(block.text for block in tutorial_blocks())
    assert not [printed for printed in SMALLER if printed not in text]
    said = []
    for block in tutorial_blocks():
        script = block.text
        for printed, smaller in SMALLER.items():
            script = script.replace(printed, smaller)
        said.append(run(script, clone, programs))
    metrics = (clone / "runs/my_videos/metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, metrics) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    answers = [json.loads(line) for line in (clone / "answers.jsonl").read_text().splitlines()]
    expected = re.findall(r'"assistant", "content": "([^"]+)"', text)
    assert sorted(answer["expected"] for answer in answers) == sorted(expected)
    assert any("within" in text for text in said), "verify has compared"
    assert len(open_folder(clone / "exports/my_videos")) > 100
    check_format(clone / "runs/my_videos/checkpoints/step-00000003")
    shown = re.search(r"```text\n(.+?)```", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    preview = (clone / "runs/my_videos.zarr.preview.txt").read_text()
    for piece in re.split(r"\.\.\. |\n", shown[1].strip()):
        assert piece in preview, "what the page shows of the preview is what stands there"


def check_format(checkpoint: Path) -> None:
    """Check that the page of the checkpoint's form names every file and every kind of tensor."""
    rows = re.findall(r"^\| (`.+?) \|", FORMAT.read_text(), re.MULTILINE)
    named = tuple(name for row in rows for name in re.findall(r"`([^`]+)`", row))
    files = {re.sub(r"__\d+_0", "__R_0", path.name) for path in checkpoint.iterdir()}
    assert not files - set(named)
    keys = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert not [key for key in keys if not key.startswith(named)]
