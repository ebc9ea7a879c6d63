# SPDX-License-Identifier: Apache-2.0
"""The states of a rank's random generators, as numbers and tensors alone.

Python's and NumPy's own forms are objects that only a pickle can hold, and a pickle can run code.
"""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def random_state() -> dict[str, Any]:
    """Return the states of this rank's generators."""
    kind, keys, position, has_normal, normal = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_normal, normal),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def restore_random(state: dict[str, Any]) -> None:
    """Set this rank's generators to what `random_state` returned."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
