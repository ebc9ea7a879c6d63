# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed from a wheel: complete, and independent of the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING_SECONDS = 240
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build in a copy of the sources, since setuptools would reuse what build/ holds."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, sources)
    for name in ("megatron_keye", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(folder)],
        cwd=sources,
        env=os.environ | {"MEGATRON_KEYE_BUILD_CUDA": "0"},
        check=True,
    )
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an interpreter that knows the wheel and its dependencies only, and the folder."""
    folder = tmp_path_factory.mktemp("installed")
    target = folder / "target"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    # Folders that a .pth file names are searched, but their own .pth files, such as that of an
    # editable installation, are not read.
    (site / "wheel.pth").write_text(f"{target}\n{sysconfig.get_path('purelib')}\n")
    return python, target


def run(
    installed: tuple[Path, Path], folder: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    """Run the console script in an empty folder."""
    python, target = installed
    ours = ("PYTHONPATH", "RANK", "RANKS")
    return subprocess.run(
        [str(python), str(target / "bin" / "megatron-keye"), *words],
        env={name: value for name, value in os.environ.items() if name not in ours},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TRAINING_SECONDS,
        check=False,
    )


def test_the_wheel_holds_code_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        report = archive.read("megatron_keye/extension_build.txt").decode().strip()
    package = {path.relative_to(ROOT) for path in (ROOT / "megatron_keye").rglob("*.py")}
    kernels = {path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    expected = {path.as_posix() for path in package | {"megatron_keye" / path for path in kernels}}
    assert expected <= names, expected - names
    assert {"megatron_keye/py.typed", "megatron_keye/recipes/keye_tiny.jsonl"} <= names
    assert report == "megatron_keye._C was not built: MEGATRON_KEYE_BUILD_CUDA=0"
    assert wheel.name.endswith("-py3-none-any.whl"), "as a wheel without the extension"
    folders = {name.split("/")[0] for name in names}
    assert {folder.split("-")[0] for folder in folders} == {"megatron_keye"}


def test_it_is_the_wheel_that_runs(installed: tuple[Path, Path], tmp_path: Path) -> None:
    python, target = installed
    code = (
        "import megatron_keye, megatron_keye.kernels.primitives as kernels; "
        "print(megatron_keye.__file__, kernels.__file__)"
    )
    command = [str(python), "-c", code]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(Path(word).is_relative_to(target) for word in told.stdout.split())
    shown = run(installed, tmp_path, "settings", "data")
    assert shown.returncode == 0, shown.stderr
    assert "data.row_tokens" in shown.stdout and "training.steps" not in shown.stdout


def test_it_trains(installed: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("train", "keye_tiny", "--ranks", "1", "--set", "training.steps=2")
    done = run(installed, tmp_path, *words, "--set", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert (tmp_path / "runs" / "keye_tiny" / "summary.json").is_file()
