"""Seeds a rank's random generators, Megatron's for parallel axes too, and keeps their states."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

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


def random_states() -> dict[str, Any]:
    """Return the states of all generators of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Let all generators continue where `random_states` was called."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
