# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, and the library keeps to the habits a reader relies on.

The rules stand in CONTRIBUTING.md; they are read from the syntax tree, so nothing is imported.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Part of the package -> the other parts that its files import, no more and no fewer; a part comes
# after those that it imports.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "kernels": set(),
    "config": {"errors"},
    "recipes": {"config", "errors"},
    "files": {"errors"},
    "plan": {"config"},
    "observe": {"errors"},
    "parallel": {"config", "errors", "observe", "plan"},
    "data": {"config", "errors", "files", "plan"},
    "scoring": {"data", "errors"},
    "production": {"data", "errors", "files", "scoring"},
    "vision": {"config", "kernels"},
    "decoder": {"config", "kernels", "parallel"},
    "model": {"config", "decoder", "parallel", "vision"},
    "optim": {"config", "model", "parallel"},
    "checkpoint": {"config", "errors", "files", "model", "optim", "parallel"},
    "verify": {"checkpoint", "config", "data", "decoder", "errors", "parallel", "vision"},
    "estimate": {"checkpoint", "config", "data", "errors", "files", "observe", "plan"},
    "training": {
        *("checkpoint", "config", "data", "decoder", "errors", "estimate", "model", "observe"),
        *("optim", "parallel", "plan"),
    },
    "profiling": {"config", "errors", "estimate", "observe", "plan"},
    "rollout": {
        *("checkpoint", "config", "data", "decoder", "errors", "model", "observe", "parallel"),
        "training",
    },
    "evaluation": {
        *("config", "data", "errors", "files", "model", "parallel", "rollout", "scoring"),
        "training",
    },
    "post_training": {
        *("checkpoint", "config", "data", "decoder", "errors", "files", "model", "observe"),
        *("parallel", "rollout", "scoring", "training"),
    },
}
# Entry points may import every part: the command line, and the package's own public names.
ENTRY_POINTS = ("cli", "__main__", "")
# Part or file -> the packages outside the standard library that it may import; absent means any.
ALLOWED_PACKAGES = {
    "errors": set(),
    "config": set(),
    "config/megatron.py": {"megatron", "torch"},
    "recipes": set(),
    "files": set(),
    "plan": {"numpy"},
    "estimate": {"numpy"},
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
            target = rest[0] if rest and rest[0] in (*ALLOWED, "cli") else ""
            # A name of the package itself (its version) belongs to no part, so anyone may take it.
            is_free = part in ENTRY_POINTS or target in ("", part)
            if not is_free and target not in ALLOWED[part]:
                errors.append(f"{where}: {part} may import {sorted(ALLOWED[part])}")
        elif top in FORBIDDEN_EVERYWHERE:
            errors.append(f"{where}: the library imports none of {sorted(FORBIDDEN_EVERYWHERE)}")
        elif packages is not None and top not in sys.stdlib_module_names and top not in packages:
            errors.append(f"{where}: {part} may import the standard library, {sorted(packages)}")
    return errors


def habit_errors(name: str, source: str) -> list[str]:
    """Return one sentence for each statement that the library does without."""
    if part_of(name) in ENTRY_POINTS:
        return []
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
    parts = {part_of(name) for name in FILES}
    assert parts <= {*ALLOWED, *ENTRY_POINTS}, "add the new part to ALLOWED"


def test_no_rule_is_wider_than_the_code() -> None:
    used: dict[str, set[str]] = {part: set() for part in ALLOWED}
    for name, path in FILES.items():
        part = part_of(name)
        for _, module in imported_modules(name, ast.parse(path.read_text())):
            top, *rest = module.split(".")
            if top == "megatron_keye" and rest and rest[0] in ALLOWED and part in ALLOWED:
                used[part] |= {rest[0]} - {part}
    assert used == ALLOWED


def test_parts_import_only_those_before_them() -> None:
    order = list(ALLOWED)
    for part, others in ALLOWED.items():
        late = [other for other in others if order.index(other) >= order.index(part)]
        assert not late, f"{part} imports {late}"


def file_imports() -> dict[str, set[str]]:
    """Return the files of the library that each file imports, by the names of FILES."""
    return {
        name: {
            target
            for _, module in imported_modules(name, ast.parse(path.read_text()))
            if (target := file_of(module)) and target != name
        }
        for name, path in FILES.items()
    }


def file_of(module: str) -> str:
    """Return the file that an import of this dotted name reads first, "" outside the library."""
    top, *rest = module.split(".")
    while top == "megatron_keye" and rest:
        for name in ("/".join(rest) + ".py", "/".join(rest) + "/__init__.py"):
            if name in FILES:
                return name
        rest.pop()
    return ""


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of files that import each other, over any number of steps."""
    sorter, found = TopologicalSorter(imports), []
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = error.args[1]
        found.append(cycle)
        rest = {name: others - {cycle[1]} for name, others in imports.items() if name != cycle[1]}
        found += circles(rest)
    return found


def test_no_files_import_each_other() -> None:
    found = circles(file_imports())
    assert not found, "\n".join(" <- ".join(circle) for circle in found)


def test_a_circle_is_found() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert [set(circle) for circle in circles(imports)] in (
        [{"a", "b", "c"}, {"e", "f"}],
        [{"e", "f"}, {"a", "b", "c"}],
    )
    assert circles({"a": {"b"}, "b": {"d"}, "c": {"a"}, "d": set()}) == []


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
        ("plan/step.py", "import torch"),
        ("plan/step.py", "from megatron_keye.data.row import PackedRow"),
        ("checkpoint/state.py", "from megatron_keye.training.step import TrainingStep"),
        ("data/loader.py", "from megatron_keye.checkpoint.hf import config"),
        ("training/step.py", "from megatron_keye.verify import dump"),
        ("training/step.py", "from megatron_keye.cli import train"),
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
        ("checkpoint/training_checkpoint.py", "from megatron_keye import model, optim"),
        ("cli/train.py", "from megatron_keye.training.trainer import Trainer"),
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
