# SPDX-License-Identifier: Apache-2.0
"""The environment variables of a rank, in one place for every launcher."""

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

_MAX_THREADS = 8
"""More threads per rank only slow each other down."""


def complete_environment(environment: MutableMapping[str, str], *, local_ranks: int) -> None:
    """Add the variables that a rank needs before torch is imported; keep those that are set.

    Args:
        environment: Variables of this process, or of one to be started; changed in place.
        local_ranks: Ranks that share this machine's cores.
    """
    # Megatron's tensor parallelism needs 1, so that communication is launched before the matmuls.
    # Without it, 8 lets vision ranks compute while a message still waits for the decoder.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    threads = len(os.sched_getaffinity(0)) // local_ranks
    environment.setdefault("OMP_NUM_THREADS", str(min(max(threads, 1), _MAX_THREADS)))
    # For processes that a rank starts: the folder kernels/ must not shadow the package `kernels`.
    environment.setdefault("PYTHONSAFEPATH", "1")
    # Messages of torch in C++ bring C++ stack frames, among them those of ranks that lose another,
    # of which `cli/failure.py` tells. NCCL's threads would end the process the same way, at an
    # error or a late exchange; the watchdog looks at both.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    environment.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    # Transformer Engine looks there first. Without it, it loads the system's cuDNN beside the one
    # that torch brings, and torch refuses to compute with an older one.
    folder = bundled_cudnn()
    if folder:
        environment.setdefault("CUDNN_HOME", folder)


def bundled_cudnn() -> str:
    """Return the folder of the cuDNN that is installed beside torch; "" without one.

    It is not asked for as `nvidia.cudnn`: a package `nvidia` of another folder, such as the one
    that comes with DALI, would hide it.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return ""
    folder = Path(torch.origin).parents[1] / "nvidia" / "cudnn"
    return str(folder) if folder.is_dir() else ""
