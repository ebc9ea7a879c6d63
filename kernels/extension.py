"""The compiled extension `megatron_keye._C`: loaded once, and why an operator of it is missing.

Imported only by the CUDA bindings, so that everything else works without a compiler.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

_BUILD_COMMAND = "MEGATRON_KEYE_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e ."


def missing_reason(operator: str) -> str | None:
    """Return why an operator of the extension is not there, or None when it is."""
    reason = _load()
    if reason is None and not hasattr(torch.ops.megatron_keye, operator):
        return f"it was built before {operator} was written"
    return reason


def register(operator: str, fake: Callable[..., Tensor]) -> None:
    """Tell torch.compile what an operator returns, if it is there.

    Args:
        operator: Its name in the extension.
        fake: Takes its arguments and returns an empty tensor of the result's shape and type.
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
        return str(error)
    return None
