"""Converts config.json of the released checkpoint to and from the model's sizes.

Text fields are at the top level, `vision_config` and `sa_config` below. Standard library only.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from megatron_keye.config.model import (
    DecoderConfig,
    ExpertsConfig,
    IndexerConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_keye.errors import UserError

CONFIG = "config.json"
# Field of config.json -> our field, dotted below ModelConfig.
_FIELDS = {
    "vocab_size": "decoder.vocab_size",
    "hidden_size": "decoder.hidden_size",
    "moe_intermediate_size": "decoder.experts.intermediate_size",
    "num_hidden_layers": "decoder.num_layers",
    "num_attention_heads": "decoder.num_heads",
    "num_key_value_heads": "decoder.num_kv_heads",
    "head_dim": "decoder.head_dim",
    "num_experts": "decoder.experts.num_experts",
    "num_experts_per_tok": "decoder.experts.num_experts_per_token",
    "rms_norm_eps": "decoder.rms_norm_eps",
    "rope_theta": "decoder.rope_theta",
    "rope_scaling.mrope_section": "decoder.rope_sections",
    "image_token_id": "image_token_id",
    "video_token_id": "video_token_id",
    "vision_start_token_id": "vision_start_token_id",
    "vision_end_token_id": "vision_end_token_id",
    "sa_config.indexer_num_heads": "decoder.indexer.num_heads",
    "sa_config.indexer_head_dim": "decoder.indexer.head_dim",
    "sa_config.topk": "decoder.indexer.top_k",
    "vision_config.hidden_size": "vision.hidden_size",
    "vision_config.intermediate_size": "vision.intermediate_size",
    "vision_config.num_hidden_layers": "vision.num_layers",
    "vision_config.num_attention_heads": "vision.num_heads",
    "vision_config.image_size": "vision.image_size",
    "vision_config.patch_size": "vision.patch_size",
    "vision_config.spatial_merge_size": "vision.merge_size",
    "vision_config.layer_norm_eps": "vision.layer_norm_eps",
    "vision_config.rope_theta": "vision.rope_theta",
}
# Properties of the architecture; another value means another model.
_FIXED: dict[str, Any] = {
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_scaling.rope_type": "default",
    "sa_config.indexer_num_kv_heads": 1,
    "vision_config.num_channels": 3,
    "vision_config.hidden_act": "gelu_pytorch_tanh",
}
# Written where the given config.json has no such field.
_DEFAULTS: dict[str, Any] = {
    "intermediate_size": 6144,
    "max_position_embeddings": 262_144,
    "fast_video_token_id": 151_678,
    "sa_config.q_chunk_size": 512,
    "sa_config.kv_chunk_size": 512,
}
_OWN_TYPE = "KeyeVL2"
_OWN_CLASS = "KeyeVL2MoeForConditionalGeneration"
_TYPE_FIELDS = ("dtype", "torch_dtype")


def check_config(path: Path, model: ModelConfig, *, model_type: str = _OWN_TYPE) -> None:
    """Raise unless a config.json describes the same model; fields that it leaves out may differ.

    Args:
        path: The config.json.
        model: Sizes of the recipe.
        model_type: The required model type.

    Raises:
        UserError: Naming the field, both values and the flag to set.
    """
    config = read_config(path)
    for field, name in _FIELDS.items():
        got, expected = _get(config, field), _attribute(model, name)
        if got is not None and got != expected:
            shown = ",".join(map(str, got)) if isinstance(got, list) else got
            raise UserError(
                f"{path}: got {field} = {got}, expected {expected} as in the recipe; use the "
                f"recipe of this checkpoint or --set model.{name}={shown}"
            )
    for field, expected in (_FIXED | {"model_type": model_type}).items():
        got = _get(config, field)
        if got is not None and got != expected:
            raise UserError(
                f"{path}: got {field} = {got!r}, expected {expected!r}; this is another model, "
                "which can't be converted"
            )


def read_config(path: Path) -> dict[str, Any]:
    """Return a config.json.

    Raises:
        UserError: When it is absent or no JSON object.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: got {error}, expected a JSON file; copy it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: got {type(config).__name__}, expected an object; copy it again")
    return config


def model_from_config(path: Path, *, num_packing_positions: int) -> ModelConfig:
    """Return the sizes in a config.json, for running a checkpoint without a recipe.

    Args:
        path: The config.json.
        num_packing_positions: Rows of the checkpoint's unused table, which no field gives.

    Raises:
        UserError: When a field is missing, or the file describes another kind of model.
    """
    config = read_config(path)
    vision: dict[str, Any] = {"num_packing_positions": num_packing_positions}
    decoder: dict[str, Any] = {"experts": {}, "indexer": {}}
    tree: dict[str, Any] = {"vision": vision, "decoder": decoder}
    for field, name in _FIELDS.items():
        value = _get(config, field)
        if value is not None:
            _put(tree, name, tuple(value) if isinstance(value, list) else value)
    if _get(config, "rope_scaling.mrope_interleaved"):
        raise UserError(
            f"{path}: got rope_scaling.mrope_interleaved = true, expected contiguous sections; "
            "this is another model"
        )
    decoder["experts"] = _section(ExpertsConfig, path, decoder["experts"], "decoder.experts.")
    decoder["indexer"] = _section(IndexerConfig, path, decoder["indexer"], "decoder.indexer.")
    tree["decoder"] = _section(DecoderConfig, path, decoder, "decoder.")
    tree["vision"] = _section(VisionConfig, path, vision, "vision.")
    model = _section(ModelConfig, path, tree, "")
    check_config(path, model)
    return model


def _section[Section: ExpertsConfig | IndexerConfig | DecoderConfig | VisionConfig | ModelConfig](
    kind: type[Section], path: Path, values: dict[str, Any], prefix: str
) -> Section:
    """Build one section; raise a UserError naming a field that config.json lacks."""
    needed = {prefix + f.name for f in fields(kind) if f.default is MISSING} - {
        prefix + name for name in values
    }
    for field, name in _FIELDS.items():
        if name in needed:
            raise UserError(
                f"{path}: got no field {field}, expected one; copy the file again or add it"
            )
    return kind(**values)


def make_config(model: ModelConfig, dtype: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        model: Sizes.
        dtype: Type of the tensors, as "bfloat16".
        base: A config.json whose further fields are kept; may be empty.
    """
    config: dict[str, Any] = json.loads(json.dumps(base))
    for field, value in _DEFAULTS.items():
        if _get(config, field) is None:
            _put(config, field, value)
    for field, value in _FIXED.items():
        _put(config, field, value)
    config |= {"model_type": _OWN_TYPE, "architectures": [_OWN_CLASS]}
    for field, name in _FIELDS.items():
        _put(config, field, _attribute(model, name))
    # Older checkpoints name the type torch_dtype; the name is kept.
    for field in [name for name in _TYPE_FIELDS if name in config] or _TYPE_FIELDS[:1]:
        config[field] = dtype
    return config


def _get(config: Mapping[str, Any], field: str) -> Any:
    node: Any = config
    for key in field.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _put(config: dict[str, Any], field: str, value: object) -> None:
    *parents, leaf = field.split(".")
    for key in parents:
        if not isinstance(config.get(key), dict):
            config[key] = {}  # Qwen3 writes a null rope_scaling
        config = config[key]
    config[leaf] = value


def _attribute(model: ModelConfig, name: str) -> Any:
    node: Any = model
    for key in name.split("."):
        node = getattr(node, key)
    return list(node) if isinstance(node, tuple) else node
