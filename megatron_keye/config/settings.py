# SPDX-License-Identifier: Apache-2.0
"""Lists all settings of a run: name, type, default and meaning.

They are read from the dataclasses and the docstrings of their fields, so that help and
documentation agree with the code.
"""

import ast
import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass
from difflib import get_close_matches
from typing import Any, Literal

from megatron_keye.config.check import suggest
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

_TYPE_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting."""

    name: str
    """Dotted name, as in --set."""
    type: str
    """Type of its values, in words."""
    default: str | None
    """Default, written as for --set; None if every recipe sets it."""
    meaning: str
    """Docstring of the field, as one paragraph."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The settings of one dataclass."""

    name: str
    """Dotted name; "" for the run itself."""
    meaning: str
    """First paragraph of the class's docstring."""
    settings: tuple[Setting, ...]
    """In the order of the class, without those of nested sections."""


def read_sections() -> list[Section]:
    """Return all sections of a run, each before its nested ones."""
    return list(_walk(RunConfig, ""))


def select_sections(name: str) -> list[Section]:
    """Return the sections with only those settings whose dotted names begin with `name`.

    Args:
        name: A section or a setting, such as training.optimizer; "" for all.

    Raises:
        UserError: When there is none; suggests similar names.
    """
    sections = read_sections()
    if not name:
        return sections
    chosen = []
    for section in sections:
        settings = tuple(s for s in section.settings if f"{s.name}.".startswith(f"{name}."))
        if settings:
            chosen.append(dataclasses.replace(section, settings=settings))
    if not chosen:
        raise UserError(f"settings: got {name!r}, expected a section or a setting; {_near(name)}")
    return chosen


def _near(name: str) -> str:
    sections = read_sections()
    names = [section.name for section in sections if section.name]
    every = [*names, *(setting.name for section in sections for setting in section.settings)]
    leaf = name.rpartition(".")[2]
    same_leaf = [each for each in every if each.rpartition(".")[2] == leaf]
    return suggest(name, same_leaf or get_close_matches(name, every, cutoff=0.5) or names)


def _walk(section: type, name: str) -> Iterator[Section]:
    hints, meanings = typing.get_type_hints(section), _field_docstrings(section)
    below = f"{name}." if name else ""
    settings, inner = [], []
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            inner.append((typing.cast(type, kind), f"{below}{field.name}"))
        elif field.init:
            settings.append(
                Setting(
                    name=f"{below}{field.name}",
                    type=_describe_type(kind),
                    default=_describe_default(field),
                    meaning=meanings.get(field.name, ""),
                )
            )
    doc = " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())
    yield Section(name=name, meaning=doc, settings=tuple(settings))
    for kind, path in inner:
        yield from _walk(kind, path)


def _field_docstrings(section: type) -> dict[str, str]:
    """Return the docstring below each field of a class, as one paragraph."""
    source = inspect.getsource(sys.modules[section.__module__])
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    found = {}
    for node, following in zip(body, body[1:], strict=False):
        match node, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
    return found


def _describe_type(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(kind) is tuple:
        inside = _describe_type(arguments[0])
        return f"list of {inside}" if arguments[-1] is Ellipsis else f"{len(arguments)} x {inside}"
    return _TYPE_NAMES[kind]


def _describe_default(field: Field[Any]) -> str | None:
    if field.default is MISSING:
        return None
    if isinstance(field.default, str):
        return field.default or '""'
    return json.dumps(field.default)
