"""Imports point one way, and the library keeps to the habits a reader relies on.

The rules stand in CONTRIBUTING.md; they are read from the syntax tree, so nothing is imported.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("config", "parallel", "kernels", "data", "vision", "decoder", "model")
EVERYTHING = {*LAYERS, "training", "checkpoint"}

# Part of the package -> the other parts it may import.
ALLOWED = {
    "": EVERYTHING,  # megatron_keye/__init__.py names the public interface
    "config": set(),
    "kernels": set(),
    "parallel": {"config"},
    "data": {"config", "parallel", "kernels"},
    "vision": {"config", "parallel", "kernels"},
    "decoder": {"config", "parallel", "kernels"},
    "model": {"config", "parallel", "kernels", "data", "vision", "decoder"},
    "training": EVERYTHING,
    "checkpoint": EVERYTHING,
}
# Part -> the packages outside the standard library that it may import; absent means any.
ALLOWED_PACKAGES = {
    "config": set(),
    "config/megatron.py": {"megatron", "torch"},
    "kernels": {"torch", "triton"},
}
FORBIDDEN_EVERYWHERE = {"launch", "tools", "tests", "kernels"}


def library_files() -> Iterator[tuple[str, Path]]:
    """Yield each file of the library with its path in the package, the link not followed."""
    for path in sorted((ROOT / "megatron_keye").rglob("*.py")):
        name = path.relative_to(ROOT / "megatron_keye").as_posix()
        if not name.startswith("kernels/"):
            yield name, path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield f"kernels/{path.relative_to(ROOT / 'kernels').as_posix()}", path


FILES = dict(library_files())


def part_of(name: str) -> str:
    """Return which part of the package a file or module belongs to; "" is the package itself."""
    first = name.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of each import, `from a import b` as a.b."""
    package = ["megatron_keye", *name.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [*above, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)


def import_errors(name: str, source: str) -> list[str]:
    """Return one sentence for each import of a file that points the wrong way."""
    part = part_of(name)
    packages = ALLOWED_PACKAGES.get(name, ALLOWED_PACKAGES.get(part))
    errors = []
    for line, module in imported_modules(name, ast.parse(source)):
        where = f"{name}:{line} imports {module}"
        top, *rest = module.split(".")
        if top == "megatron_keye":
            target = rest[0] if rest and rest[0] in ALLOWED else ""
            # A name of the package itself (its version) belongs to no part, so anyone may take it.
            if target and target != part and target not in ALLOWED.get(part, set()):
                errors.append(f"{where}: {part} may import {sorted(ALLOWED.get(part, set()))}")
        elif top in FORBIDDEN_EVERYWHERE:
            errors.append(f"{where}: the library imports none of {sorted(FORBIDDEN_EVERYWHERE)}")
        elif packages is not None and top not in sys.stdlib_module_names and top not in packages:
            errors.append(f"{where}: {part} may import the standard library, {sorted(packages)}")
    return errors


def habit_errors(name: str, source: str) -> list[str]:
    """Return one sentence for each statement that the library does without."""
    errors = []
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        match node:
            case ast.ExceptHandler(type=None):
                errors.append(f"{where}: bare except")
            case ast.Assert(msg=None):
                errors.append(f"{where}: assert without text")
            case ast.Global():
                errors.append(f"{where}: global")
            case ast.Call(func=ast.Name(id="print")):
                errors.append(f"{where}: print in the library")
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "getenv" | "putenv"):
                errors.append(f"{where}: the library reads no environment")
            case ast.ImportFrom(module="os", names=names) if {n.name for n in names} & {
                "environ",
                "getenv",
            }:
                errors.append(f"{where}: the library reads no environment")
            case ast.Attribute(value=ast.Name(id="parallel_state" | "mpu"), attr=attr) if (
                attr.startswith("get_") and part_of(name) != "parallel"
            ):
                errors.append(f"{where}: global process groups; take the group as an argument")
    return errors


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name: str) -> None:
    errors = import_errors(name, FILES[name].read_text())
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("name", FILES)
def test_the_library_keeps_its_habits(name: str) -> None:
    errors = habit_errors(name, FILES[name].read_text())
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("name", FILES)
def test_sources_are_ascii(name: str) -> None:
    assert FILES[name].read_bytes().isascii(), name


def test_every_part_of_the_package_has_a_rule() -> None:
    assert {part_of(name) for name in FILES} <= set(ALLOWED), "add the new part to ALLOWED"


def test_kernels_is_a_link_and_no_package() -> None:
    assert (ROOT / "megatron_keye" / "kernels").readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide the package `kernels`"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("config/model.py", "import torch"),
        ("config/model.py", "from megatron_keye.parallel import grid"),
        ("kernels/op/api.py", "from megatron_keye import config"),
        ("kernels/op/api.py", "import numpy"),
        ("parallel/grid.py", "from ..decoder import layer"),
        ("vision/encoder.py", "from megatron_keye.decoder.layer import x"),
        ("decoder/layer.py", "import megatron_keye.model"),
        ("model.py", "def f():\n    from megatron_keye.training import loss"),
        ("training/step.py", "import kernels"),
        ("training/step.py", "from tools import doctor"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str) -> None:
    assert len(import_errors(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("config/megatron.py", "import torch\nfrom megatron.core import x"),
        ("config/run.py", "from megatron_keye.config.model import ModelConfig\nimport json"),
        ("kernels/op/api.py", "import triton.language as tl\nfrom . import reference"),
        ("model.py", "from megatron_keye.decoder import layer"),
        ("checkpoint/store.py", "from megatron_keye import model, training"),
        ("vision/encoder.py", "from megatron_keye import __version__"),
    ],
)
def test_a_right_import_is_let_through(name: str, source: str) -> None:
    assert import_errors(name, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    pass\nexcept:\n    pass",
        "assert x",
        "def f():\n    global x",
        "print(1)",
        "import os\nos.environ['A']",
        "from os import environ",
        "parallel_state.get_tensor_model_parallel_group()",
    ],
)
def test_a_bad_habit_is_found(source: str) -> None:
    assert len(habit_errors("training/step.py", source)) == 1
