"""The JSON lines of benchmarks: what they share, and where they go."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


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


def write_line(line: dict[str, Any], out: Path | None) -> None:
    """Print a line, and append it to a file if there is one."""
    text = json.dumps(line) + "\n"
    sys.stdout.write(text)
    if out is not None:
        with out.open("a") as file:
            file.write(text)
