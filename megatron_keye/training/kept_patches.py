# SPDX-License-Identifier: Apache-2.0
"""Decides on each rank that encodes how many patches of a step keep their activations."""

import logging
import sys

import torch

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.kept_patches import affordable_patches
from megatron_keye.parallel.grid import Grid
from megatron_keye.plan.slots import vision_learns

_logger = logging.getLogger(__name__)


def kept_patches(run: RunConfig, grid: Grid, device: torch.device) -> int:
    """Return the patches of a step whose activations this rank keeps, and log it once.

    Ranks decide alone, since a step's result is the same bit for bit.

    Args:
        run: The run.
        grid: This rank.
        device: Where it encodes.
    """
    setting = run.parallel.vision.recompute
    if grid.vision is None or not vision_learns(run) or setting == "on":
        return 0
    if setting == "off":
        return sys.maxsize
    if device.type != "cuda":
        return 0
    memory = torch.cuda.get_device_properties(device).total_memory
    kept = affordable_patches(run, grid.rank, memory)
    if grid.rank == grid.vision_ranks[0]:
        _logger.info(
            "vision keeps the activations of up to %s patches of a step, for which this GPU of "
            "%.0f GiB has room, and encodes others again (parallel.vision.recompute=auto)",
            f"{kept:,}",
            memory / 2**30,
        )
    return kept
