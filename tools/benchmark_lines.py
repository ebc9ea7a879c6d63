# SPDX-License-Identifier: Apache-2.0
"""The JSON lines of benchmarks: what they share, and where they go."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_keye.errors import UserError


def shared_fields(module: str) -> dict[str, str]:
    """Return Python, commit and command of a benchmark.

    Args:
        module: Name behind `python -m`.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "python": platform.python_version(),
        "commit": commit,
        "command": f"python -m {module} {' '.join(sys.argv[1:])}".strip(),
    }


def metrics_of_run(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl.

    Raises:
        UserError: When the folder has none.
    """
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: has no metrics.jsonl, expected the folder of a run")
    return [json.loads(line) for line in file.read_text().splitlines()]


def fields_of_run(folder: Path) -> dict[str, Any]:
    """Return what the last start of a run recorded of machine, program and command.

    Raises:
        UserError: When the folder has no such record.
    """
    file = folder / "environment.json"
    if not file.is_file():
        raise UserError(f"--lines: {folder} has no environment.json, which a run writes")
    start = json.loads(file.read_text())[-1]
    versions = {name: start["versions"][name] for name in ("torch", "python")}
    _, _, arguments = start["command"].partition(" ")
    return {
        "device": start["device"],
        **versions,
        "commit": re.sub(r"^(.{7})[0-9a-f]*", r"\1", start["commit"]),
        "command": f"python {arguments}",
    }


def write_line(line: dict[str, Any], out: Path | None) -> None:
    """Print a line, and append it to a file if there is one."""
    text = json.dumps(line) + "\n"
    sys.stdout.write(text)
    if out is not None:
        with out.open("a") as file:
            file.write(text)
