# SPDX-License-Identifier: Apache-2.0
"""Packages that single tasks need, of the extra `rewards`."""

from importlib import import_module
from typing import Any

from megatron_keye.errors import UserError


def import_for_task(task: str, module: str, package: str) -> Any:
    """Return a module that a task needs.

    Args:
        task: The task.
        module: What is imported.
        package: What is installed for it.

    Raises:
        UserError: When it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"task {task!r}: needs {package}; pip install 'megatron-keye[rewards]'"
        ) from error
