# SPDX-License-Identifier: Apache-2.0
"""A rank's environment is completed, and what the user has set stays."""

import importlib
import sys
from pathlib import Path

import pytest

from megatron_keye.cli import environment
from megatron_keye.cli.environment import bundled_cudnn, complete_environment


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(64, 4, "8"), (8, 4, "2"), (2, 4, "1")])
def test_ranks_share_the_cores(
    cores: int, ranks: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(environment, "bundled_cudnn", lambda: "/site/nvidia/cudnn")
    variables: dict[str, str] = {}
    complete_environment(variables, local_ranks=ranks)
    assert variables == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDNN_HOME": "/site/nvidia/cudnn",
        "OMP_NUM_THREADS": threads,
        "PYTHONSAFEPATH": "1",
        "TORCH_CPP_LOG_LEVEL": "FATAL",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }


def test_the_users_values_stay() -> None:
    mine = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "CUDNN_HOME": "/opt/cudnn",
        "OMP_NUM_THREADS": "5",
        "PYTHONSAFEPATH": "",
        "TORCH_CPP_LOG_LEVEL": "INFO",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
    }
    variables = dict(mine)
    complete_environment(variables, local_ranks=2)
    assert variables == mine


def test_torchs_own_cudnn_is_found_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, other = tmp_path / "site", tmp_path / "other"
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [str(other), str(site)])
    assert bundled_cudnn() == "", "no torch"
    for package in (site / "torch", other / "nvidia"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    importlib.invalidate_caches()
    assert bundled_cudnn() == "", "a torch of the system's cuDNN"
    (site / "nvidia" / "cudnn").mkdir(parents=True)
    assert bundled_cudnn() == str(site / "nvidia" / "cudnn"), "another package nvidia comes first"
