# SPDX-License-Identifier: Apache-2.0
"""What the sparse decode's kernels share: a key's place in the cache, and overlapping launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def may_overlap(tensor: Tensor) -> bool:
    """Return whether a kernel can be launched while the one before it ends: from Hopper on."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9


@triton.jit
def find_slots(
    pages: tl.tensor,
    key: tl.tensor,
    is_key: tl.tensor,
    num_pages: int,
    PAGE: tl.constexpr,
) -> tl.tensor:
    """Return page and place of each key, and which of them exist."""
    page = tl.load(pages + key // PAGE, is_key, other=-1)
    return page.to(tl.int64), (key % PAGE).to(tl.int64), (page >= 0) & (page < num_pages)
