"""Every source file names its licence, so that a file that was copied elsewhere still does."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUFFIXES = {
    *(".py", ".sh", ".sbatch", ".yml", ".yaml", ".toml"),
    *(".cu", ".cuh", ".h", ".cpp"),
}
NAMES = {"Makefile", "Dockerfile", ".ci/run"}
LINE = "SPDX-License-Identifier: Apache-2.0"


def test_every_source_file_names_the_licence() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = [
        path
        for path in map(Path, names.splitlines())
        if (path.suffix in SUFFIXES or path.as_posix() in NAMES) and (ROOT / path).is_file()
    ]
    assert len(sources) > 500
    texts = {path: (ROOT / path).read_text() for path in sources}
    lacking = [
        str(path) for path, text in texts.items() if text.strip() and LINE not in text[:400]
    ]
    assert not lacking, f"add the line `{LINE}` at the top of {', '.join(lacking)}"
