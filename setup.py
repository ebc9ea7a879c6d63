# SPDX-License-Identifier: Apache-2.0
"""Adds the CUDA extension `megatron_keye._C` to the package when this machine can build it.

Apart from pyproject.toml because whether to compile is known only where the package is
installed. Torch must be importable then, so install with `pip install --no-build-isolation -e .`
after torch. MEGATRON_KEYE_BUILD_CUDA decides: `1` builds or fails saying why, `0` never builds;
unset, it builds where nvcc, a CUDA build of torch of the same major version, and a GPU are found.
A machine without a GPU, such as CI, therefore spends no time in the compiler.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Hopper with its own instructions (wgmma); TORCH_CUDA_ARCH_LIST overrides it.
DEFAULT_ARCH = "9.0a"


def find_nvcc() -> Path | None:
    """Return the CUDA compiler of CUDA_HOME, else of PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    return Path(found).resolve() if found else None


def toolkit_home(nvcc: Path) -> Path:
    """Return the toolkit's folder as `nvcc` names it, since `nvcc` in PATH may be a wrapper."""
    command = [str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    match = re.search(r"_HERE_=(.+)", text)
    return (Path(match[1].strip()) if match else nvcc.parent).parent


def nvcc_release(nvcc: Path) -> str:
    """Return the toolkit release of `nvcc`, such as "13.0", or "" when it does not say."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else ""


def has_gpu() -> bool:
    """Return whether the driver shows an NVIDIA GPU (under WSL: any GPU)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def reason_against_building(choice: str) -> str:
    """Return in one line why the extension is not built here, or "" when it is.

    Args:
        choice: Value of MEGATRON_KEYE_BUILD_CUDA: "1", "0" or "".

    Raises:
        SystemExit: The value is none of these.
    """
    if choice not in ("", "0", "1"):
        sys.exit(f"MEGATRON_KEYE_BUILD_CUDA: got {choice!r}, expected 0, 1 or nothing")
    if choice == "0":
        return "MEGATRON_KEYE_BUILD_CUDA=0"
    if not any((ROOT / "csrc").glob("*/*.cu")):
        return "csrc/ holds no CUDA source"
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc in CUDA_HOME or PATH"
    if choice != "1" and not has_gpu():  # before torch, whose import takes seconds
        return "no GPU is visible (MEGATRON_KEYE_BUILD_CUDA=1 builds all the same)"
    try:
        import torch
    except ImportError:
        return "torch is not importable here (install it, then use --no-build-isolation)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    release = nvcc_release(nvcc)
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release or 'unknown'}, torch is built for CUDA {torch.version.cuda}"
    return ""


def cuda_extension() -> dict[str, Any]:
    """Return the arguments that make `setup` build `megatron_keye._C`."""
    nvcc = find_nvcc()
    assert nvcc is not None, "checked by reason_against_building"
    # Set before torch.utils.cpp_extension is imported, which reads it then and never again.
    os.environ.setdefault("CUDA_HOME", str(toolkit_home(nvcc)))
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCH)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    sources = sorted(
        str(path.relative_to(ROOT))
        for pattern in ("*.cpp", "*/*.cpp", "*/*.cu")
        for path in (ROOT / "csrc").glob(pattern)
    )
    # The operators behind csrc/*/*_sm90a.cu are registered only in a build for this target.
    has_hopper = DEFAULT_ARCH in os.environ["TORCH_CUDA_ARCH_LIST"]
    extension = CUDAExtension(
        name="megatron_keye._C",
        sources=sources,
        define_macros=[("MEGATRON_KEYE_SM90A", None)] if has_hopper else [],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20"],
            "nvcc": ["-O3", "-std=c++20", "-lineinfo"],
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


class BuildWithReport(build_py):
    """Puts into the package what was said of the extension, since pip hides what a build prints.

    `megatron-keye doctor` and the error of a missing operator repeat it. A wheel's name says it
    too: one without the extension ends in py3-none-any.
    """

    def run(self) -> None:
        """Copy the package, then write the report beside it."""
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        (root / "megatron_keye" / "extension_build.txt").write_text(REPORT + "\n")


CHOICE = os.environ.get("MEGATRON_KEYE_BUILD_CUDA", "")
REASON = reason_against_building(CHOICE)
if REASON and CHOICE == "1":
    sys.exit(f"MEGATRON_KEYE_BUILD_CUDA=1, but megatron_keye._C cannot be built: {REASON}")
arguments: dict[str, Any] = {"cmdclass": {}} if REASON else cuda_extension()
REPORT = f"megatron_keye._C was not built: {REASON}"
if not REASON:
    nvcc = find_nvcc()
    release = nvcc_release(nvcc) if nvcc else ""
    REPORT = (
        f"megatron_keye._C was built by CUDA {release} for {os.environ['TORCH_CUDA_ARCH_LIST']}"
    )
print(REPORT, file=sys.stderr)
arguments["cmdclass"]["build_py"] = BuildWithReport
setup(**arguments)
