"""The environment of a rank, in one place for every launcher."""

import os
from collections.abc import MutableMapping

_MAX_THREADS = 8
"""More threads per rank only get in each other's way."""


def complete_environment(environment: MutableMapping[str, str], *, local_ranks: int) -> None:
    """Add what a rank needs before torch is imported; what the user has set stays.

    Args:
        environment: Of this process, or of one to be started.
        local_ranks: Ranks that share this machine's cores.
    """
    # 1 orders tensor-parallel communication before the matmuls. Without tensor parallelism 8 lets
    # vision ranks compute behind a message that still waits for the decoder.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    threads = len(os.sched_getaffinity(0)) // local_ranks
    environment.setdefault("OMP_NUM_THREADS", str(min(max(threads, 1), _MAX_THREADS)))
    # For the processes that a rank starts: a folder named kernels/ must not shadow a package.
    environment.setdefault("PYTHONSAFEPATH", "1")
