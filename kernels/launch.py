# SPDX-License-Identifier: Apache-2.0
"""What the Triton implementations share on the host: where they can run, and block sizes.

Imported only by them, so that everything else works where Triton cannot compile.
"""

from typing import NamedTuple

import triton
from torch import Tensor

from megatron_keye.kernels.arguments import check_dtypes
from megatron_keye.kernels.implementations import TRITON_DTYPES

SMALLEST_DOT = 16
"""Fewest rows, columns and terms of a tl.dot."""


class Blocks(NamedTuple):
    """How a kernel cuts its work; the result does not depend on it but for rounding."""

    rows: int
    """Most rows of a program: queries, or queries times heads where heads are rows."""
    keys: int
    """Keys of a step."""
    warps: int
    stages: int
    """Steps whose keys are on their way at once."""
    registers: int | None = None
    """Most registers of a thread, so that more programs share a multiprocessor; None for any."""


def check_triton(operator: str, first: Tensor, **tensors: Tensor) -> None:
    """Raise unless Triton can run here with tensors of these types.

    Args:
        operator: Name of the operator, for messages.
        first: A tensor whose device counts.
        tensors: Floating-point tensors under their public names.

    Raises:
        RuntimeError: The tensors are not on a GPU and Triton is not interpreted.
        ValueError: A tensor has a type that Triton implementations do not take.
    """
    if not first.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"{operator}: impl 'triton' got tensors on {first.device}, expected a GPU; take "
            "impl='eager', or set TRITON_INTERPRET=1 before the first call to try it on a CPU"
        )
    check_dtypes(TRITON_DTYPES, **tensors)


def padded(size: int, smallest: int = SMALLEST_DOT) -> int:
    """Return the power of two that holds `size`, at least `smallest`."""
    return max(smallest, int(triton.next_power_of_2(size)))


def adjacent_channels(tensor: Tensor) -> Tensor:
    """Return `tensor` with its last dimension adjacent in memory, copied only when it is not.

    A stride known to be 1 lets the kernels load 16 bytes at once.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def same_strides(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of one shape, both copied if they lie differently in memory."""
    if first.stride() == second.stride():
        return first, second
    return first.contiguous(), second.contiguous()
