# SPDX-License-Identifier: Apache-2.0
"""Recipes, and their look-up: by name in this package, in a user's file, or from an earlier run.

A recipe is a function that returns a RunConfig for a given number of ranks. A file of this package
lists its recipes by name in RECIPES. Needs no torch.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any, Protocol

from megatron_keye.config import RunConfig
from megatron_keye.config.check import suggest
from megatron_keye.errors import UserError

FORMS = "a recipe's name, FILE.py:FUNCTION, or the run.json of an earlier run"
_FOLDER = Path(__file__).parent


class Recipe(Protocol):
    """A function that returns a run."""

    def __call__(self, *, num_ranks: int, has_gpu: bool) -> RunConfig:
        """Return the run.

        Args:
            num_ranks: Number of ranks, for which degrees are chosen.
            has_gpu: Whether ranks have GPUs, for which precision is chosen.
        """


def recipe_names() -> list[str]:
    """Return the names of all recipes of the package."""
    return sorted(_recipes())


@functools.cache
def _recipes() -> dict[str, Recipe]:
    """Return the recipes of all files of the package, by name."""
    files = sorted(_FOLDER.glob("[a-z]*.py"))
    modules = (importlib.import_module(f"{__name__}.{file.stem}") for file in files)
    return {name: recipe for module in modules for name, recipe in module.RECIPES.items()}


def load_recipe(name: str) -> Recipe:
    """Return the function of a recipe.

    Args:
        name: A recipe of the package; FILE.py:FUNCTION for a user's own, where FUNCTION defaults
            to the name of the file; or the run.json in the folder of an earlier run, whose degrees
            stay as they are.

    Raises:
        UserError: For an unknown name, suggesting similar ones; a missing file or function; a
            run.json with an unknown field, naming it.
    """
    file, _, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    if file.endswith(".py"):
        return _load_function(Path(file), function or Path(file).stem)
    if name.endswith(".json"):
        return _load_run(Path(name))
    recipes = _recipes()
    if name not in recipes:
        raise UserError(f"recipe: got {name!r}, expected {FORMS}; {suggest(name, recipes)}")
    return recipes[name]


def _load_function(file: Path, name: str) -> Recipe:
    if not file.is_file():
        raise UserError(f"recipe: got {file}, which does not exist, expected a Python file")
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # in which dataclasses look up their module
    spec.loader.exec_module(module)
    recipe = getattr(module, name, None)
    if not callable(recipe):
        raise UserError(
            f"recipe: got {file}:{name}, expected a function of that name in the file; "
            f"name it as {file}:FUNCTION"
        )
    _check_parameters(recipe, f"{file}:{name}")

    def checked(*, num_ranks: int, has_gpu: bool) -> RunConfig:
        run = recipe(num_ranks=num_ranks, has_gpu=has_gpu)
        if not isinstance(run, RunConfig):
            raise UserError(
                f"recipe: {file}:{name} returned {type(run).__name__}, expected a RunConfig"
            )
        return run

    return checked


def _check_parameters(recipe: Any, name: str) -> None:
    signature = inspect.signature(recipe)
    try:
        signature.bind(num_ranks=1, has_gpu=False)
    except TypeError as error:
        raise UserError(
            f"recipe: got {name}{signature}, expected a function that takes num_ranks and has_gpu "
            "as keyword arguments"
        ) from error


def _load_run(file: Path) -> Recipe:
    try:
        run = RunConfig.from_json(file.read_text())
    except UserError as error:
        raise UserError(f"recipe: {file}: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"recipe: {file} cannot be read ({error}), expected {FORMS}") from error

    def recorded(*, num_ranks: int, has_gpu: bool) -> RunConfig:
        return run

    return recorded
