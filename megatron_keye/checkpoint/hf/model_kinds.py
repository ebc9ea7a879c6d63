# SPDX-License-Identifier: Apache-2.0
"""Recognises checkpoints of other models and forms, and says what each is and what to do.

Standard library only.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_keye.errors import UserError

# Beginning of model_type, in lower case -> what it is, and what to do.
_KINDS = {
    "keyevl2": "a Keye-VL-2.0 model; convert it with hf-to-native",
    "keye": (
        "an earlier Keye-VL model with a dense decoder; its vision encoder can be taken with "
        "warm-start --vision"
    ),
    "qwen3_moe": (
        "a text model of the right kind, without vision and indexers; begin from it with "
        "warm-start --qwen"
    ),
    "qwen3_vl": (
        "a Qwen3-VL model, whose vision encoder and rotary positions differ; begin from a Qwen3 "
        "text model instead, with warm-start --qwen"
    ),
    "qwen3_next": "a Qwen3-Next model, with another attention; take a Qwen3-MoE model",
    "qwen3": "a dense Qwen3 model, without experts; take a Qwen3-MoE model, such as Qwen3-30B-A3B",
    "qwen2": "a Qwen2 model, with other layers; take a Qwen3-MoE model, such as Qwen3-30B-A3B",
    "siglip": "a vision encoder; take it with warm-start --vision",
}
# Beginning of a tensor's name -> whose names these are, and what to do.
_NAMES = {
    "base_model.model.": "a LoRA adapter's; merge it into its base model first",
    "model.language_model.": (
        "Qwen3-VL's; take the released Keye-VL-2.0, or a Qwen3 text model with warm-start --qwen"
    ),
    "model.visual.": (
        "Qwen3-VL's; take the released Keye-VL-2.0, or a Qwen3 text model with warm-start --qwen"
    ),
    "module.": "those of a training framework's wrapper; export the model with that framework",
    "_orig_mod.": "those of torch.compile's wrapper; save the model without it",
    "_fsdp_wrapped_module.": "those of a training framework's wrapper; export with that framework",
}
_DENSE_SUFFIX = ".layers.0.mlp.gate_proj.weight"
# End of a tensor's name that only quantised checkpoints have -> their form.
_QUANTISED = {
    "weight_scale_inv": "FP8",
    "weight_scale": "compressed-tensors (FP8, INT8 or INT4)",
    "weight_packed": "compressed-tensors (INT4)",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight.absmax": "bitsandbytes (4 bits)",
    "SCB": "bitsandbytes (8 bits)",
}
_FLOAT8_NAMES = ("F8_E4M3", "F8_E5M2")


def check_model_type(config: Mapping[str, Any], path: Path, accepted: tuple[str, ...]) -> None:
    """Raise a UserError unless a config.json names an accepted type; none accepted: any.

    Args:
        config: Its content.
        path: The file.
        accepted: Values of model_type.
    """
    kind = config.get("model_type")
    if not accepted or kind in accepted:
        return
    wanted = " or ".join(map(repr, accepted))
    if kind is None:
        raise UserError(f"{path}: got no model_type, expected {wanted}; copy the file again")
    lower = str(kind).lower()
    meaning = next(
        (meaning for start, meaning in _KINDS.items() if lower.startswith(start)),
        "another model, which can't be converted",
    )
    raise UserError(f"{path}: got model_type = {kind!r}, expected {wanted}; this is {meaning}")


def check_not_quantised(config: Mapping[str, Any], types: Mapping[str, str], where: Path) -> None:
    """Raise a UserError for a checkpoint of quantised weights.

    Args:
        config: Its config.json.
        types: Type of each tensor, by safetensors' names.
        where: The folder.
    """
    described = config.get("quantization_config") or config.get("compression_config")
    found = ""
    if described:
        method = described.get("quant_method") if isinstance(described, Mapping) else described
        found = f"quantization_config with quant_method = {method!r} in config.json"
    for name, kind in types.items():
        if found:
            break
        form = next((f for suffix, f in _QUANTISED.items() if name.endswith("." + suffix)), "")
        if kind in _FLOAT8_NAMES:
            form = "FP8"
        if form:
            found = f"tensor {name} of type {kind}, as {form} checkpoints have"
    if found:
        raise UserError(
            f"{where}: got {found}, expected weights in bf16, fp16 or fp32; a quantised "
            "checkpoint can't be converted, take the original that it was made from"
        )


def check_names(names: Iterable[str], where: Path) -> None:
    """Raise a UserError for a checkpoint with tensors named as in another model.

    Args:
        names: Names of its tensors.
        where: The folder.
    """
    for name in names:
        meaning = next((m for start, m in _NAMES.items() if name.startswith(start)), "")
        if name.endswith(_DENSE_SUFFIX):
            meaning = (
                "those of a dense decoder, without experts; take a Qwen3-MoE model, such as "
                "Qwen3-30B-A3B"
            )
        if meaning:
            raise UserError(
                f"{where}: got tensor {name}, expected names of Keye-VL-2.0 or Qwen3-MoE; these "
                f"are {meaning}"
            )
