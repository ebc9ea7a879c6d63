# SPDX-License-Identifier: Apache-2.0
"""The compiled extension `megatron_keye._C`: loaded once, and why an operator of it is missing.

Imported only by the CUDA bindings, so that everything else works without a compiler.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

_HOPPER = (9, 0)
"""Compute capability of the GPUs whose own instructions some operators need."""
_BUILD_COMMAND = "MEGATRON_KEYE_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e ."


def missing_reason(operator: str) -> str | None:
    """Return why an operator of the extension is not there, or None when it is."""
    reason = _load()
    if reason is None and not hasattr(torch.ops.megatron_keye, operator):
        return f"it was built before {operator} was written"
    return reason


def hopper_reason(operator: str, device: torch.device) -> str | None:
    """Return why an operator with Hopper's own instructions does not run, or None when it does.

    Args:
        operator: Its name in the extension, which is built.
        device: A GPU.

    Returns:
        The reason as "got ..., expected ...".
    """
    capability = torch.cuda.get_device_capability(device)
    if capability != _HOPPER:
        return f"got a GPU of compute capability {capability}, expected {_HOPPER}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_keye::{operator}", "CUDA"):
        return "got an extension built without TORCH_CUDA_ARCH_LIST=9.0a, expected it with that"
    return None


def first_unsupported(got_and_expected: Iterable[tuple[bool, str, str]]) -> str | None:
    """Return what an operator does not take of a call, as "got ..., expected ...", or None.

    Args:
        got_and_expected: Whether something is not taken, what it is and what it should be.
    """
    return next(
        (f"got {got}, expected {expected}" for is_it, got, expected in got_and_expected if is_it),
        None,
    )


def check_taken(operator: str, unsupported: str | None) -> None:
    """Raise when a call is not taken, since exceptions of the extension can't be relied on.

    Args:
        operator: Its public name.
        unsupported: What is not taken, as "got ..., expected ...".

    Raises:
        ValueError: With that and what to take instead.
    """
    if unsupported is not None:
        raise ValueError(f"{operator}: {unsupported} with impl 'cuda'; take impl='triton'")


def register(operator: str, fake: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Tell torch.compile what an operator returns, if it is there.

    Args:
        operator: Its name in the extension.
        fake: Takes its arguments and returns empty tensors of the results' shapes and types.
    """
    if missing_reason(operator) is None:
        torch.library.register_fake(f"megatron_keye::{operator}", fake)


def check_built(operator: str) -> None:
    """Raise unless an operator of the extension is there.

    Raises:
        RuntimeError: With the reason and the command that builds it.
    """
    reason = missing_reason(operator)
    if reason is not None:
        raise RuntimeError(
            f"{operator}: impl 'cuda' needs the extension megatron_keye._C, which does not load "
            f"({reason}); build it with `{_BUILD_COMMAND}`, or take another impl"
        )


@functools.cache
def _load() -> str | None:
    """Register the extension's operators; return the reason when that is impossible."""
    try:
        importlib.import_module("megatron_keye._C")
    except ImportError as error:
        report = Path(__file__).parents[1] / "extension_build.txt"
        said = f"; {report.read_text().strip()}" if report.is_file() else ""
        return f"{error}{said}"
    return None
