# SPDX-License-Identifier: Apache-2.0
"""Seeds a rank's random generators, Megatron's for parallel axes too."""

import random

import numpy as np
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_keye.parallel.grid import Grid


def seed_rank(seed: int, grid: Grid) -> None:
    """Seed Python, NumPy, torch and Megatron's RNG tracker.

    Ranks of one tensor group draw different numbers where tensors are split, and the same ones
    where they are not.

    Args:
        seed: Seed of the run.
        grid: This rank and its groups.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    groups = grid.decoder or grid.vision
    assert groups is not None, "each rank is in a grid"
    model_parallel_cuda_manual_seed(
        seed,
        tp_rank=groups.tp.rank(),
        ep_rank=groups.ep.rank(),
        etp_rank=groups.expt_tp.rank(),
        force_reset_rng=True,
    )
