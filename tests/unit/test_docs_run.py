# SPDX-License-Identifier: Apache-2.0
"""Python on the pages runs as it stands, and so do commands that take a second."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.doc_pages import PAGES, ROOT, blocks_of, name_of

THIS = "tests/unit/test_docs_run.py"
PYTHON = [
    pytest.param(block.text, id=f"{name_of(page)}:{block.line}")
    for page in PAGES
    for block in blocks_of(page)
    if block.language == "python" and block.mark is None
]
QUICK_COMMANDS = [
    pytest.param(block.text, id=f"{name_of(page)}:{block.line}")
    for page in PAGES
    for block in blocks_of(page)
    if block.mark == ("run", THIS)
]


@pytest.mark.parametrize("source", PYTHON)
def test_python_runs(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "page", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("script", QUICK_COMMANDS)
def test_quick_commands_run(script: str, tmp_path: Path) -> None:
    program = f'megatron-keye() {{ "{sys.executable}" -P -m megatron_keye "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", program + script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and done.stdout, done.stderr


def test_there_is_something_to_run() -> None:
    assert PYTHON and QUICK_COMMANDS
