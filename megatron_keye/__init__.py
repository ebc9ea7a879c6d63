# SPDX-License-Identifier: Apache-2.0
"""Training stack for Keye-VL-2.0: long video, sparse attention, 3D parallelism.

Public names are imported on first use (PEP 562), since torch takes seconds to import, and
configuration and planning do not need it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_keye.config.run import RunConfig
    from megatron_keye.errors import UserError
    from megatron_keye.model import KeyeModel, build_model
    from megatron_keye.recipes import load_recipe, recipe_names
    from megatron_keye.training.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "KeyeModel",
    "RunConfig",
    "Trainer",
    "UserError",
    "__version__",
    "build_model",
    "load_recipe",
    "recipe_names",
]

_MODULES = {
    "KeyeModel": "megatron_keye.model",
    "RunConfig": "megatron_keye.config.run",
    "Trainer": "megatron_keye.training.trainer",
    "UserError": "megatron_keye.errors",
    "build_model": "megatron_keye.model",
    "load_recipe": "megatron_keye.recipes",
    "recipe_names": "megatron_keye.recipes",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
