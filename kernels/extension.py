"""The compiled extension `megatron_keye._C`: loaded once, and why it cannot be.

Imported only by the CUDA bindings, so that everything else works without a compiler.
"""

import functools
import importlib

_BUILD_COMMAND = "MEGATRON_KEYE_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e ."


@functools.cache
def missing_reason() -> str | None:
    """Return why the extension does not load here, or None after registering its operators."""
    try:
        importlib.import_module("megatron_keye._C")
    except ImportError as error:
        return str(error)
    return None


def check_built(operator: str) -> None:
    """Raise unless the extension is built and loads.

    Args:
        operator: Name of the operator, for the message.

    Raises:
        RuntimeError: With the reason and the command that builds it.
    """
    reason = missing_reason()
    if reason is not None:
        raise RuntimeError(
            f"{operator}: impl 'cuda' needs the extension megatron_keye._C, which does not load "
            f"({reason}); build it with `{_BUILD_COMMAND}`, or take another impl"
        )
