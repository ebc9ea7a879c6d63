# SPDX-License-Identifier: Apache-2.0
"""Writes config.json of a model, on the base of one that came with its weights.

Standard library only.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.hf.config import attribute, field_value, get, put
from megatron_keye.checkpoint.hf.config_fields import FIELDS, OWN_TYPE, Absent, ConfigField
from megatron_keye.config.model import ModelConfig
from megatron_keye.errors import UserError

# Written where the base has no such field.
_DEFAULTS: dict[str, Any] = {
    "intermediate_size": 6144,
    "max_position_embeddings": 262_144,
    "fast_video_token_id": 151_678,
    "sa_config.q_chunk_size": 512,
    "sa_config.kv_chunk_size": 512,
}
_OWN_CLASS = "KeyeVL2MoeForConditionalGeneration"
_TYPE_FIELDS = ("dtype", "torch_dtype")


def make_config(model: ModelConfig, dtype: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        model: Sizes.
        dtype: Type of the tensors, as "bfloat16".
        base: A config.json whose further fields are kept; may be empty.
    """
    config: dict[str, Any] = json.loads(json.dumps(base))
    config.pop("quantization_config", None)
    for name, default in _DEFAULTS.items():
        if get(config, name) is None:
            put(config, name, default)
    config |= {"model_type": OWN_TYPE, "architectures": [_OWN_CLASS]}
    for field in FIELDS:
        value = _value(model, field)
        if _has_no_effect(config, field):
            continue
        for place in field.places:
            had = get(config, place)
            if place == field.name and field.is_released:
                put(config, place, value)
            elif had is not None and field.synonyms.get(str(had), had) != value:
                put(config, place, [value] * len(had) if field.is_list_of_value else value)
    # Older checkpoints name the type torch_dtype; the name is kept, in each section.
    if not any(config.get(name) for name in _TYPE_FIELDS):
        config[_TYPE_FIELDS[0]] = dtype
    for section in (config, *(part for part in config.values() if isinstance(part, dict))):
        section |= {name: dtype for name in _TYPE_FIELDS if section.get(name) is not None}
    return config


def changes_of_config(model: ModelConfig, base: Mapping[str, Any], path: Path) -> list[str]:
    """Return sentences about the fields of a base that the model's config.json changes.

    Args:
        model: Sizes.
        base: A config.json that came with the weights, or with files that are added.
        path: The file.

    Raises:
        UserError: When sizes of tensors differ, so that the file is of another model.
    """
    changes = []
    for field in FIELDS:
        old, new = field_value(base, field, path), _value(model, field)
        values = old if field.is_list_of_value and isinstance(old, list) else [old]
        is_same = all(value in (None, new) for value in values)
        if is_same or _has_no_effect(base, field):
            continue
        if field.absent is Absent.SHOWN_BY_TENSORS:
            raise UserError(
                f"{path}: got {field.name} = {old}, expected {new} as in the checkpoint; take "
                "the files of the model that it was made from"
            )
        changes.append(f"{field.name} is {new}, as trained, where {path} has {old}")
    if base.get("quantization_config"):
        changes.append(f"quantization_config of {path} is left out, as nothing is quantised")
    return changes


def _value(model: ModelConfig, field: ConfigField) -> Any:
    return attribute(model, field.setting) if field.setting else field.value


def _has_no_effect(config: Mapping[str, Any], field: ConfigField) -> bool:
    return bool(field.unless_false) and get(config, field.unless_false) is False
