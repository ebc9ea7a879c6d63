# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: one rule for all operators.

Their implementations stand from the plainest to the fastest, and the default is the last one that
suits the call.
"""

import functools
import logging

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Floating-point types that the Triton implementations take; they accumulate in float32."""

_logger = logging.getLogger(__name__)


def choose_impl(
    operator: str, impl: str | None, implementations: tuple[str, ...], **suits: bool
) -> str:
    """Return the implementation to run: the one asked for, else the default, which is logged once.

    Args:
        operator: Name of the operator, for messages.
        impl: Name of an implementation, or None for the default.
        implementations: What exists, the plainest first, which suits every call.
        suits: Which of the others suit this call. One that is left out has to be asked for.

    Raises:
        ValueError: When there is no implementation of that name.
    """
    if impl is None:
        candidates = [implementations[0], *(name for name in implementations if suits.get(name))]
        _log_default(operator, candidates[-1])
        return candidates[-1]
    if impl not in implementations:
        raise ValueError(
            f"{operator}: got impl = {impl!r}, expected one of {', '.join(implementations)}; "
            "leave impl out for the default"
        )
    return impl


def suits_triton(*tensors: Tensor) -> bool:
    """Return whether all tensors are on a GPU in a type that the Triton implementations take."""
    return all(t.is_cuda and t.dtype in TRITON_DTYPES for t in tensors)


@functools.cache
def _log_default(operator: str, chosen: str) -> None:
    """Name the default once per process, not once per layer and step."""
    _logger.info("%s runs as %s", operator, chosen)
