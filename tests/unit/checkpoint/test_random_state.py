# SPDX-License-Identifier: Apache-2.0
"""Generators go on where they were saved, by numbers and tensors alone."""

import io
import random
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_keye.checkpoint.random_state import random_state, restore_random
from megatron_keye.checkpoint.safe_metadata import load_plain
from megatron_keye.parallel.cpu import run_megatron_on_cpu


def draws() -> list[float]:
    """Draw from every generator; normal numbers come in pairs, of which one is kept."""
    drawn = [random.random(), random.gauss(0, 1), float(np.random.rand())]
    drawn += [float(np.random.standard_normal()), float(torch.rand(()))]
    with get_cuda_rng_tracker().fork("test"):
        return [*drawn, float(torch.rand(()))]


def test_all_generators_go_on(tmp_path: Path) -> None:
    run_megatron_on_cpu()
    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add("test", 7)
    draws()
    stream = io.BytesIO()
    torch.save(random_state(), stream)
    expected = [draws() for _ in range(3)]
    stream.seek(0)
    restore_random(load_plain(stream, tmp_path))
    assert [draws() for _ in range(3)] == expected
