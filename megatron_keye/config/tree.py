# SPDX-License-Identifier: Apache-2.0
"""Settings as nested JSON data: from dataclasses, back into them, and single ones changed."""

import dataclasses
import json
import sys
import types
import typing
from typing import Any, Literal

from megatron_keye.config.check import check, suggest
from megatron_keye.errors import UserError

RENAMED = {
    "parallel.decoder.chunks_per_stage": "parallel.decoder.virtual_stages",
    "training.recompute_layers": "training.recompute",
    "training.max_skipped_steps": "training.health.max_bad_steps",
}
"""Former names of settings, as in run.json files and checkpoints of earlier versions."""
FORMER_VALUES = {"training.recompute_layers": {False: "none", True: "full"}}
"""What true and false under a former name are now, where the setting is of another type."""


def plain(node: Any) -> Any:
    """Return dataclasses as dicts, without derived fields, and tuples as lists."""
    if dataclasses.is_dataclass(node):
        return {f.name: plain(getattr(node, f.name)) for f in dataclasses.fields(node) if f.init}
    return [plain(item) for item in node] if isinstance(node, tuple) else node


def leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the settings of nested sections by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inside = leaves(value, f"{path}{name}.") if isinstance(value, dict) else {}
        found |= inside or {f"{path}{name}": value}
    return found


def rename(tree: dict[str, Any]) -> None:
    """Give the settings of a tree that an earlier version wrote the names of this one."""
    for former, name in RENAMED.items():
        _move(tree, former.split("."), name.split("."))


def assign(section: type, tree: dict[str, Any], name: str, text: str) -> None:
    """Change one setting of a tree.

    Args:
        section: Dataclass of the tree.
        tree: As `plain` returns it.
        name: Dotted name of the setting.
        text: Its value, as `--set` takes it.

    Raises:
        UserError: For an unknown name, or one of a section.
    """
    *parents, leaf = name.split(".")
    path = ""
    for parent in parents:
        section = _field_type(section, parent, path)
        path += f"{parent}."
        check(dataclasses.is_dataclass(section), path[:-1], name, "no dot after this setting")
        tree = tree[parent]
    wanted = _field_type(section, leaf, path)
    if dataclasses.is_dataclass(wanted):
        inside = ", ".join(_fields(typing.cast(type, wanted)))
        raise UserError(f"{name}: is a section; set one of its fields: {inside}")
    tree[leaf] = _parse(text, wanted)


def build(wanted: Any, value: Any, path: str) -> Any:
    """Return JSON data as a value of the `wanted` type; UserError if it is none."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        section = typing.cast(type, wanted)
        below = f"{path}." if path else ""
        parts = {}
        for name, part in value.items():
            parts[name] = build(_field_type(section, name, below), part, f"{below}{name}")
        return section(**parts)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        check(len(kinds) == len(items), path, value, f"{len(kinds)} values")
        return tuple(build(kind, item, path) for kind, item in zip(kinds, items, strict=True))
    if origin is Literal:
        check(value in arguments, path, value, f"one of {arguments}")
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        check(abs(value) <= sys.float_info.max, path, value, "a number below 1e308")
        return float(value)
    assert not isinstance(wanted, types.UnionType), f"{path}: config fields have one type"
    check(type(value) is wanted, path, value, f"a value of type {wanted.__name__}")
    return value


def _move(tree: dict[str, Any], former: list[str], name: list[str]) -> None:
    """Move a setting of nested sections to another name, if it is there."""
    source, target = tree, tree
    for section in former[:-1]:
        source = source.get(section, {})
    if former[-1] in source:
        for section in name[:-1]:
            target = target.setdefault(section, {})
        value = source.pop(former[-1])
        if isinstance(value, bool):
            value = FORMER_VALUES.get(".".join(former), {}).get(value, value)
        target[name[-1]] = value


def _fields(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section) if f.init}


def _field_type(section: type, name: str, path: str) -> Any:
    known = _fields(section)
    if f"{path}{name}" in RENAMED:
        raise UserError(f"{path}{name}: is called {RENAMED[f'{path}{name}']} now; use that name")
    if name not in known:
        raise UserError(f"{path}{name}: no such field; {suggest(name, known)}")
    return known[name]


def _parse(text: str, wanted: Any) -> Any:
    """Return an override's text as JSON data of the `wanted` type, or as it is."""
    arguments = typing.get_args(wanted)
    if wanted is str or (typing.get_origin(wanted) is Literal and text in arguments):
        return text
    if typing.get_origin(wanted) is tuple and not text.startswith("["):
        return [_parse(item.strip(), arguments[0]) for item in text.split(",")] if text else []
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
