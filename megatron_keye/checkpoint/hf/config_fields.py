# SPDX-License-Identifier: Apache-2.0
"""The fields of config.json that decide what the model computes, as one table.

A field is a setting of ours, or a property that our model has in one form only. What a file leaves
out has the value that the released code gives it, which is compared like any other. Standard
library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

Part = Literal["text", "positions", "indexer", "vision", "merge", "tokens"]


class Absent(Enum):
    """What it means that a file lacks a field, where no value can be assumed."""

    SHOWN_BY_TENSORS = "another value would show in the shape of a tensor"
    REFUSED = "the released code's own value is not published"


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """A field of config.json and what it is compared with."""

    name: str
    """Dotted name in the released file."""
    part: Part
    """Part of the model that depends on it."""
    setting: str = ""
    """Our setting, dotted below ModelConfig; "" for a property with one value."""
    value: Any = None
    """The value that our model computes, where it is no setting."""
    absent: Any = Absent.SHOWN_BY_TENSORS
    """The value of a file that lacks it, or what its absence means."""
    other_names: tuple[str, ...] = ()
    """Names in files of other writers."""
    synonyms: Mapping[Any, Any] = field(default_factory=dict)
    """Values of other writers that mean another one."""
    is_released: bool = True
    """Whether the released file has it, so that it is always written."""
    is_list_of_value: bool = False
    """Whether files give one value for each layer."""
    unless_false: str = ""
    """Field that, where it is false, takes all effect from this one."""

    @property
    def places(self) -> tuple[str, ...]:
        """Where files have it; text fields also below text_config."""
        names = (self.name, *self.other_names)
        if self.part in ("vision", "merge"):
            return names
        return (*names, *(f"text_config.{name}" for name in names))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of checkpoint that weights are taken from."""

    model_types: tuple[str, ...]
    """Accepted values of model_type; none: any."""
    parts: frozenset[Part]
    """What is taken from it, so that other fields do not count."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """Values of absent fields where its code has others."""


OWN_TYPE = "KeyeVL2"
KEYE = Family(
    model_types=(OWN_TYPE,),
    parts=frozenset(("text", "positions", "indexer", "vision", "merge", "tokens")),
)
QWEN = Family(
    model_types=("qwen3_moe",),
    parts=frozenset(("text",)),
    # Of transformers' Qwen3MoeConfig.
    absent={
        "num_experts_per_tok": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "norm_topk_prob": False,
    },
)
VISION_ENCODER = Family(
    model_types=(),
    parts=frozenset(("vision",)),
    # Of transformers' SiglipVisionConfig. SigLIP itself has no rotary positions.
    absent={
        "vision_config.num_attention_heads": 12,
        "vision_config.rope_theta": Absent.SHOWN_BY_TENSORS,
    },
)


def _in_rope(leaf: str) -> tuple[str, ...]:
    """Return where a field of the rotary positions stands; transformers 5 has rope_parameters."""
    return (f"rope_scaling.{leaf}", f"rope_parameters.{leaf}")


def _text(name: str, setting: str, **options: Any) -> ConfigField:
    return ConfigField(name=name, part="text", setting=f"decoder.{setting}", **options)


def _indexer(name: str, setting: str, **options: Any) -> ConfigField:
    name = f"sa_config.{name}"
    return ConfigField(name=name, part="indexer", setting=f"decoder.indexer.{setting}", **options)


def _vision(name: str, setting: str, **options: Any) -> ConfigField:
    name = f"vision_config.{name}"
    return ConfigField(name=name, part="vision", setting=f"vision.{setting}", **options)


def _token(name: str, token_id: int) -> ConfigField:
    # Qwen's ids, which released files of the family leave out or repeat.
    return ConfigField(name=name, part="tokens", setting=name, absent=token_id)


def _fixed(name: str, value: Any, part: Part = "text", **options: Any) -> ConfigField:
    return ConfigField(name=name, part=part, value=value, **({"absent": value} | options))


FIELDS = (
    _text("vocab_size", "vocab_size"),
    _text("hidden_size", "hidden_size"),
    _text("moe_intermediate_size", "experts.intermediate_size"),
    _text("num_hidden_layers", "num_layers"),
    _text("num_attention_heads", "num_heads"),
    _text("num_key_value_heads", "num_kv_heads"),
    _text("head_dim", "head_dim"),
    _text("num_experts", "experts.num_experts", other_names=("num_local_experts",)),
    _text("num_experts_per_tok", "experts.num_experts_per_token", absent=Absent.REFUSED),
    _text("rms_norm_eps", "rms_norm_eps", absent=Absent.REFUSED),
    _text("rope_theta", "rope_theta", absent=Absent.REFUSED, other_names=_in_rope("rope_theta")),
    ConfigField(
        name="rope_scaling.mrope_section",
        part="positions",
        setting="decoder.rope_sections",
        absent=Absent.REFUSED,
        other_names=_in_rope("mrope_section")[1:],
    ),
    _token("image_token_id", 151_655),
    _token("video_token_id", 151_656),
    _token("vision_start_token_id", 151_652),
    _token("vision_end_token_id", 151_653),
    _indexer("indexer_num_heads", "num_heads"),
    _indexer("indexer_head_dim", "head_dim"),
    _indexer("topk", "top_k", absent=Absent.REFUSED),
    _vision("hidden_size", "hidden_size"),
    _vision("intermediate_size", "intermediate_size"),
    _vision("num_hidden_layers", "num_layers"),
    _vision("num_attention_heads", "num_heads", absent=Absent.REFUSED),
    _vision("image_size", "image_size"),
    _vision("patch_size", "patch_size"),
    ConfigField(
        name="vision_config.spatial_merge_size", part="merge", setting="vision.merge_size"
    ),
    _vision("layer_norm_eps", "layer_norm_eps", absent=1e-6),
    _vision("rope_theta", "rope_theta", absent=10_000.0),
    _fixed("norm_topk_prob", True),
    _fixed("tie_word_embeddings", False),
    _fixed("hidden_act", "silu"),
    _fixed("attention_bias", False),
    _fixed("decoder_sparse_step", 1),
    _fixed("mlp_only_layers", []),
    _fixed(
        "rope_scaling.rope_type",
        "default",
        # Older files say type, and mrope for the default with sections.
        other_names=(*_in_rope("rope_type")[1:], *_in_rope("type")),
        synonyms={"mrope": "default"},
    ),
    _fixed(
        "rope_scaling.mrope_interleaved",
        False,
        "positions",
        other_names=_in_rope("mrope_interleaved")[1:],
        is_released=False,
    ),
    _fixed(
        "partial_rotary_factor",
        1.0,
        other_names=_in_rope("partial_rotary_factor"),
        is_released=False,
    ),
    _fixed("use_sliding_window", False, is_released=False),
    _fixed("sliding_window", None, is_released=False, unless_false="use_sliding_window"),
    _fixed("layer_types", "full_attention", is_released=False, is_list_of_value=True),
    _fixed("sa_config.indexer_num_kv_heads", 1, "indexer"),
    _fixed("vision_config.num_channels", 3, "vision"),
    _fixed("vision_config.hidden_act", "gelu_pytorch_tanh", "vision"),
)
"""All fields that are compared. Whatever else would change the mathematics is in the tensors too
(biases, shared experts, other norms), or listed as not read."""

SECTIONS: dict[str, Part] = {
    "text_config": "text",
    "sa_config": "indexer",
    "vision_config": "vision",
}
"""Objects of config.json, and the part that their fields are about."""

ROPE_SECTIONS = ("rope_scaling", "rope_parameters")
"""Objects in which every field changes the mathematics, so that unknown ones are refused."""

UNUSED = frozenset(
    (
        # Unused by the released model, or by a model that computes a whole row at once.
        *("intermediate_size", "max_position_embeddings", "fast_video_token_id", "use_cache"),
        *("q_chunk_size", "kv_chunk_size", "max_window_layers", "temporal_patch_size"),
        *("original_max_position_embeddings", "vision_use_head", "num_nextn_predict_layers"),
        # Of training alone.
        *("initializer_range", "router_aux_loss_coef", "output_router_logits"),
        # Of generation, loading and bookkeeping.
        *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "_name_or_path"),
        *("transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("attn_implementation", "_attn_implementation", "return_dict", "output_attentions"),
        *("output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "id2label"),
        *("label2id", "problem_type", "_commit_hash"),
    )
)
"""Fields, in any section, that change no result."""
