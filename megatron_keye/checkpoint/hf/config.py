# SPDX-License-Identifier: Apache-2.0
"""Reads config.json of a released checkpoint: the model's sizes, or whether it is the same model.

Text fields are at the top level, or in text_config; `vision_config` and `sa_config` below. What
counts stands in `config_fields`. Standard library only.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.hf.config_fields import (
    FIELDS,
    KEYE,
    ROPE_SECTIONS,
    SECTIONS,
    UNUSED,
    Absent,
    ConfigField,
    Family,
)
from megatron_keye.checkpoint.hf.model_kinds import check_model_type
from megatron_keye.config.model import (
    DecoderConfig,
    ExpertsConfig,
    IndexerConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_keye.config.run import as_override
from megatron_keye.errors import UserError

CONFIG = "config.json"
_logger = logging.getLogger(__name__)
_KNOWN_PLACES = frozenset(place for field in FIELDS for place in field.places)
_ROPE_PLACES = tuple(p + section for p in ("", "text_config.") for section in ROPE_SECTIONS)


def read_config(path: Path) -> dict[str, Any]:
    """Return a config.json; that of a vision encoder alone with its fields in vision_config.

    Raises:
        UserError: When it is absent or no JSON object.
    """
    if not path.is_file():
        raise UserError(
            f"{path.parent}: got no {path.name}, expected one, since tensors alone do not tell "
            "what the model computes with them; copy it from where the weights come from"
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: got {error}, expected a JSON file; copy it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: got {type(config).__name__}, expected an object; copy it again")
    if str(config.get("model_type")).endswith("vision_model") and "vision_config" not in config:
        return {"model_type": config["model_type"], "vision_config": config}
    return config


def check_config(path: Path, model: ModelConfig, family: Family = KEYE) -> None:
    """Raise unless a config.json describes the same model; log the fields that are not read.

    Args:
        path: The config.json.
        model: Sizes of the recipe.
        family: The kind of checkpoint, and what is taken from it.

    Raises:
        UserError: Naming fields, both values and the settings to change.
    """
    config = read_config(path)
    check_model_type(config, path, family.model_types)
    for field in _fields_of(family):
        if not field.setting:
            _check_fixed(path, config, field, family)
    _check_rope_sections(path, config)
    different = []
    for field in _fields_of(family):
        if field.setting:
            got = _value(path, config, field, family)
            if got is not None and got != attribute(model, field.setting):
                different.append((field, got))
    if different:
        shown = [
            f"{_describe(path, config, field, got)}, expected {attribute(model, field.setting)}"
            for field, got in different
        ]
        flags = [f"--set {as_override(f'model.{f.setting}', got)}" for f, got in different]
        raise UserError(
            f"{path}: got {'; '.join(shown)} as in the recipe; use the recipe of this checkpoint "
            f"or {' '.join(flags)}"
        )
    if unread := list(unread_fields(config, family)):
        _logger.warning(
            "%s: not read: %s; see that none of them changes what the model computes",
            path,
            ", ".join(unread),
        )


def model_from_config(path: Path, *, num_packing_positions: int) -> ModelConfig:
    """Return the sizes in a config.json, for running a checkpoint without a recipe.

    Args:
        path: The config.json.
        num_packing_positions: Rows of the checkpoint's unused table, which no field gives.

    Raises:
        UserError: When a field is missing, or the file describes another kind of model.
    """
    config = read_config(path)
    check_model_type(config, path, KEYE.model_types)
    tree: dict[str, Any] = {"vision": {"num_packing_positions": num_packing_positions}}
    for field in FIELDS:
        if field.setting:
            value = _value(path, config, field, KEYE)
            if value is None:
                raise _missing(path, field)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, bool) or not isinstance(number, int | float):
                    raise UserError(
                        f"{path}: got {field.name} = {value!r}, expected numbers; copy the file "
                        "again or correct it"
                    )
            put(tree, field.setting, tuple(value) if isinstance(value, list) else value)
    decoder = tree["decoder"]
    decoder["experts"] = ExpertsConfig(**decoder["experts"])
    decoder["indexer"] = IndexerConfig(**decoder["indexer"])
    tree |= {"vision": VisionConfig(**tree["vision"]), "decoder": DecoderConfig(**decoder)}
    model = ModelConfig(**tree)
    check_config(path, model)
    return model


def unread_fields(config: Mapping[str, Any], family: Family, prefix: str = "") -> Iterator[str]:
    """Yield the fields that are not read, and might matter for what is taken from a checkpoint.

    Args:
        config: A config.json, or a section of it.
        family: The kind of checkpoint.
        prefix: The section's name and a dot.
    """
    for leaf, value in config.items():
        name = prefix + leaf
        if leaf in SECTIONS and isinstance(value, dict):
            if SECTIONS[leaf] in family.parts:
                yield from unread_fields(value, family, f"{name}.")
            continue
        is_known = name in _KNOWN_PLACES or leaf in UNUSED or name in _ROPE_PLACES
        is_off = value in (None, [], {}) or (leaf.endswith("dropout") and value == 0)
        if not is_known and not is_off and (prefix or "text" in family.parts):
            yield name


def field_value(config: Mapping[str, Any], field: ConfigField, path: Path) -> Any:
    """Return the value that a config.json gives a field, None if it has none.

    Args:
        config: Its content.
        field: The field, which may stand in several places.
        path: The file, for error messages.

    Raises:
        UserError: When places disagree.
    """
    found: dict[str, Any] = {}
    for place in field.places:
        value = get(config, place)
        if value is not None:
            found[place] = field.synonyms.get(value, value) if isinstance(value, str) else value
    first = next(iter(found.values()), None)
    if any(value != first for value in found.values()):
        shown = " and ".join(f"{place} = {value!r}" for place, value in found.items())
        raise UserError(f"{path}: got {shown}, expected one value; correct the file")
    return first


def get(config: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name, None without one."""
    node: Any = config
    for key in name.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def put(config: dict[str, Any], name: str, value: object) -> None:
    """Set the value of a dotted name, making objects on the way."""
    *parents, leaf = name.split(".")
    for key in parents:
        if not isinstance(config.get(key), dict):
            config[key] = {}  # Qwen3 writes a null rope_scaling
        config = config[key]
    config[leaf] = value


def attribute(model: ModelConfig, setting: str) -> Any:
    """Return a setting of the model, a tuple as a list."""
    node: Any = model
    for key in setting.split("."):
        node = getattr(node, key)
    return list(node) if isinstance(node, tuple) else node


def _fields_of(family: Family) -> Iterator[ConfigField]:
    yield from (field for field in FIELDS if field.part in family.parts)


def _value(path: Path, config: Mapping[str, Any], field: ConfigField, family: Family) -> Any:
    """Return a field's value, stated or meant by its absence; None where tensors show it."""
    value = field_value(config, field, path)
    if value is not None:
        return value
    absent = family.absent.get(field.name, field.absent)
    if absent is Absent.REFUSED:
        raise _missing(path, field)
    return None if absent is Absent.SHOWN_BY_TENSORS else absent


def _missing(path: Path, field: ConfigField) -> UserError:
    return UserError(
        f"{path}: got no field {field.name}, expected one; copy the file again or add it"
    )


def _describe(path: Path, config: Mapping[str, Any], field: ConfigField, value: object) -> str:
    if field_value(config, field, path) is None:
        return f"no {field.name}, which means {value}"
    return f"{field.name} = {value}"


def _check_fixed(
    path: Path, config: Mapping[str, Any], field: ConfigField, family: Family
) -> None:
    if field.unless_false and get(config, field.unless_false) is False:
        return
    got = _value(path, config, field, family)
    values = got if field.is_list_of_value and isinstance(got, list) else [got]
    if any(value != field.value for value in values):
        raise UserError(
            f"{path}: got {_describe(path, config, field, got)}, expected {field.value}; this is "
            "another model, which can't be converted"
        )


def _check_rope_sections(path: Path, config: Mapping[str, Any]) -> None:
    for section in _ROPE_PLACES:
        rope = get(config, section) or {}
        if not isinstance(rope, Mapping):
            raise UserError(f"{path}: got {section} = {rope!r}, expected an object; correct it")
        for leaf, value in rope.items():
            is_known = f"{section}.{leaf}" in _KNOWN_PLACES or leaf in UNUSED
            if not is_known and value is not None:
                raise UserError(
                    f"{path}: got {section}.{leaf} = {value!r}, expected no such field; this is "
                    "another model, which can't be converted"
                )
