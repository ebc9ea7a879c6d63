"""The environment variables of a rank, in one place for every launcher."""

import os
from collections.abc import MutableMapping

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
