# SPDX-License-Identifier: Apache-2.0
"""Times the ViT on frames of several sizes, to fit the cost of its attention."""

import time

import numpy as np
import torch

from megatron_keye.config import RunConfig
from megatron_keye.config.megatron import weight_dtype
from megatron_keye.estimate.break_even import fit_break_even
from megatron_keye.vision import VisionTower

_SIDES = (8, 16, 32, 64, 96)
"""Patches along each side of the square frames that are timed."""
_PATCHES = 9_216
"""Patches per timed call, about a chunk."""
_REPEATS = 5


def fit_vision(run: RunConfig, device: torch.device) -> str:
    """Time the ViT; return the times and the fitted setting as text."""
    with device:
        tower = VisionTower(run.model.vision, run.model.decoder.hidden_size)
    tower.reset_parameters(run.training.seed)
    tower = tower.to(dtype=weight_dtype(run))
    frames, seconds = [], []
    for side in _SIDES:
        patch_grids = [(side, side)] * max(1, _PATCHES // side**2)
        frames.append([side**2] * len(patch_grids))
        seconds.append(time_forward(tower, patch_grids, run.model.vision.patch_size))
    break_even = fit_break_even(frames, seconds)
    lines = [
        f"frames of {sizes[0]:>5} patches: {elapsed / sum(sizes) * 1e6:8.3f} us per patch"
        for sizes, elapsed in zip(frames, seconds, strict=True)
    ]
    lines.append(f"--set parallel.vision.attention_break_even_patches={break_even}")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def time_forward(tower: VisionTower, patch_grids: list[tuple[int, int]], patch_size: int) -> float:
    """Return the median seconds of a forward pass over frames of these patch grids."""
    weight = next(tower.parameters())
    num_patches = sum(height * width for height, width in patch_grids)
    patches = torch.zeros(num_patches, 3, patch_size, patch_size).to(weight)
    seconds = []
    for _ in range(_REPEATS + 1):
        _synchronize(weight.device)
        started = time.perf_counter()
        tower(patches, patch_grids)
        _synchronize(weight.device)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
