# SPDX-License-Identifier: Apache-2.0
"""A disk that takes no checkpoint ends a run with one sentence, and keeps nothing half-written."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_BYTES = 8 * 2**20
"""Largest file that ranks may write: less than a checkpoint's, more than their logs."""


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}", "device=cpu", "training.steps=2"]
    command = [sys.executable, "-m", "megatron_keye", "train", "keye_tiny", "--ranks", "2"]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    (said,) = re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE)
    checkpoint = tmp_path / "keye_tiny" / "checkpoints" / "step-00000002"
    assert said.startswith(f"{checkpoint}: not saved: rank ")
    assert "got a file larger than allowed, " in said
    assert said.endswith("then go on with --resume auto")
    assert "Traceback" not in done.stderr
    assert not list(checkpoint.parent.iterdir())
