# SPDX-License-Identifier: Apache-2.0
"""Detects packages, compiler, driver and failing imports on this machine.

Whatever might crash is imported in a separate process.
"""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from megatron_keye.config import backends

# What a distribution provides and, for optional ones, what happens without it.
REQUIRED = {
    "torch": "tensors, autograd, processes",
    "megatron-core": "decoder blocks, schedules, checkpoints",
    "triton": "GPU kernels; imported by megatron-core",
}
OPTIONAL = {
    "nvidia-dali": ("video decoded on the GPU", "video is decoded on the CPU"),
    "zarr": ("stores of prepared samples", "samples are tokenized again in each run"),
    "tensorboard": ("event files of a run", "no event files, only the log"),
    "wandb": ("curves on a server", "curves in files only"),
}
ALIASES = {"nvidia-dali": backends.DALI_NAMES}
IMPORT_SECONDS = 180

TORCH_PROBE = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                  "num_gpus": torch.cuda.device_count()}))
"""
CUDNN_PROBE = """
import json, os
from megatron_keye.cli.environment import complete_environment
complete_environment(os.environ, local_ranks=1)
import torch
try:
    import transformer_engine.pytorch  # may load another cuDNN, as in a rank
except Exception:
    pass  # Megatron-Core's import shows what is wrong with it
version, error = None, ""
try:
    version = torch.backends.cudnn.version()
except RuntimeError as conflict:
    error = " ".join(str(conflict).partition(". ")[0].split())
print(json.dumps({"version": version, "error": error}))
"""
EXTENSION_PROBE = """
import importlib.util, json
built = importlib.util.find_spec("megatron_keye._C") is not None
if built:
    import torch
    import megatron_keye._C
print(json.dumps({"built": built}))
"""
NVDEC_PROBE = "import ctypes; ctypes.CDLL('libnvcuvid.so.1'); print('{}')"
MEGATRON_PROBE = "import megatron.core; print('{}')"


@dataclass(frozen=True, kw_only=True)
class Torch:
    """The installed torch; `cuda` is None for a build without CUDA."""

    version: str
    cuda: str | None
    num_gpus: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All findings about the machine, before any is judged a problem."""

    versions: dict[str, str | None]
    torch: Torch | None = None
    nvcc: str | None = None
    cudnn: int | None = None
    cudnn_error: str = ""
    gpus: list[str] = field(default_factory=list)
    has_nvdec: bool = False
    has_extension: bool = False
    import_errors: dict[str, str] = field(default_factory=dict)


def probe(code: str) -> tuple[dict[str, object], str]:
    """Run `code` in another Python process, without warnings.

    Returns the JSON object on its last line of output and "", or {} and its error or exit status.
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"took longer than {IMPORT_SECONDS} s"
    if done.returncode == 0:
        found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
        return found, ""
    lines = done.stderr.strip().splitlines()
    return {}, lines[-1] if lines else f"exit status {done.returncode}"


def output_of(*command: str) -> str:
    """Return the output of a program, or "" when it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except subprocess.SubprocessError:
        return ""


def gather_facts() -> Facts:
    """Find distributions, compiler, driver and GPUs, and test the imports."""
    versions = {}
    for name in (*REQUIRED, *OPTIONAL):
        found = (backends.installed_version(alias) for alias in ALIASES.get(name, (name,)))
        versions[name] = next((version for version in found if version), None)
    release = re.search(r"release (\S+),", output_of("nvcc", "--version"))
    query = ("--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    with ThreadPoolExecutor(max_workers=4) as pool:
        probes = (TORCH_PROBE, CUDNN_PROBE, MEGATRON_PROBE, EXTENSION_PROBE, NVDEC_PROBE)
        torch, cudnn, megatron, extension, nvdec = pool.map(probe, probes)
    errors = {"torch": torch[1], "megatron.core": megatron[1], "megatron_keye._C": extension[1]}
    return Facts(
        versions=versions,
        torch=None if torch[1] else Torch(**torch[0]),  # type: ignore[arg-type]
        nvcc=release[1] if release else None,
        cudnn=cudnn[0].get("version"),  # type: ignore[arg-type]
        cudnn_error=str(cudnn[0].get("error", "")),
        gpus=output_of("nvidia-smi", *query).strip().splitlines(),
        has_nvdec=not nvdec[1],
        has_extension=bool(extension[0].get("built")),
        import_errors={name: error for name, error in errors.items() if error},
    )
