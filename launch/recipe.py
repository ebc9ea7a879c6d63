"""Finds recipes by name: a recipe is a function in launch/recipes/, in a file of its own name.

Apart from train.py, so that tools can plan and convert for a recipe without starting anything.
Needs no torch.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from megatron_keye.config import RunConfig
from megatron_keye.config.check import suggest

RECIPES = Path(__file__).resolve().parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in RECIPES.glob("[a-z]*.py"))


def load_recipe(name: str) -> Callable[..., RunConfig]:
    """Return the function that makes the recipe `name`, from the file of that name.

    Raises:
        ValueError: For an unknown name, with near ones.
    """
    if name not in recipe_names():
        raise ValueError(f"recipe {name!r}: no such recipe; {suggest(name, recipe_names())}")
    spec = importlib.util.spec_from_file_location(f"recipes.{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None, "the file is there"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe: Callable[..., RunConfig] = getattr(module, name)
    return recipe
