# SPDX-License-Identifier: Apache-2.0
"""A few faults of `tools.break_run`; the whole campaign takes half an hour."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = (
    "rank killed while it writes",
    "launcher killed",
    "damaged checkpoint",
    "NaN in a moment",
    "second job",
)


@pytest.mark.slow
def test_faults_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.break_run", "--faults", str(len(KINDS))]
    command += ["--folder", str(tmp_path)]
    command += [word for kind in KINDS for word in ("--kind", kind)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
