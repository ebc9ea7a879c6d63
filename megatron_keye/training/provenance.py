# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a run come from: environment.json in its folder, one record per start.

A run may go over several starts, on other machines and with other versions; each keeps its record.
"""

import json
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_keye import __version__
from megatron_keye.config import backends
from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.run import RunConfig

_PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", *backends.DALI_NAMES),
    *("numpy", "av", "zarr", "tiktoken", "transformers"),
)
_GIT_SECONDS = 30.0


def host_names() -> list[str]:
    """Return the machine of each rank. Collective: all ranks must call it."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


def record_start(
    run: RunConfig, first_step: int, hosts: list[str], device_name: str, fusions: Fusions
) -> None:
    """Append a record of this start to environment.json.

    Args:
        run: The run; its folder is made.
        first_step: Steps done.
        hosts: From `host_names`.
        device_name: From `throughput.device_name`.
        fusions: The fused kernels that run.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "environment.json"
    starts = json.loads(path.read_text()) if path.is_file() else []
    starts.append(
        {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "first_step": first_step + 1,
            "command": shlex.join(sys.orig_argv),
            "grid": run.parallel.describe(),
            "hosts": {host: hosts.count(host) for host in dict.fromkeys(hosts)},
            "device": device_name,
            "fusions": fusions.names(),
            "commit": commit_of(Path(__file__).parents[2]),
            "versions": _versions(),
        }
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(starts, indent=2) + "\n")
    partial.replace(path)


def _versions() -> dict[str, str]:
    """Return the versions of what computes; packages that are not installed are left out."""
    versions = {"megatron-keye": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def commit_of(root: Path) -> str | None:
    """Return the commit of a checkout, with "+changes" if tracked files differ from it.

    Args:
        root: Folder that holds megatron_keye/.

    Returns:
        None if git does not track the package there, as where it was installed from a wheel.
    """
    if _git(root, "ls-files", "--error-unmatch", "megatron_keye/__init__.py") is None:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    has_changes = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    return f"{commit}+changes" if commit and has_changes else commit


def _git(root: Path, *words: str) -> str | None:
    """Return the output of a git command, None if it fails or git is missing."""
    command: list[Any] = ["git", "-C", root, *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
