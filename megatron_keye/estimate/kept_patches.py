# SPDX-License-Identifier: Apache-2.0
"""Says how many patches of a step may keep their ViT activations on a GPU, by `memory.py`."""

from dataclasses import replace

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.memory import INACCURACY, RESERVED_BYTES, patch_bytes
from megatron_keye.estimate.ranks import plan_ranks


def affordable_patches(run: RunConfig, rank: int, device_bytes: int) -> int:
    """Return for how many patches a device has room beside what the run needs anyway.

    Args:
        run: The run.
        rank: A rank that encodes.
        device_bytes: Memory of its device.
    """
    vision = replace(run.parallel.vision, recompute="on")
    needing = replace(run, parallel=replace(run.parallel, vision=vision))
    needed = sum(plan_ranks(needing, None)[rank].memory.values()) * 2**30
    free = device_bytes - RESERVED_BYTES - INACCURACY * needed
    return max(0, int(free / patch_bytes(run)))
