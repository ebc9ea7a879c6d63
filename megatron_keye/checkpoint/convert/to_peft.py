# SPDX-License-Identifier: Apache-2.0
"""Exports the adapters of a native checkpoint alone, in the format of Hugging Face's PEFT.

adapter_config.json and adapter_model.safetensors, with the names of the released model's linears
below `base_model.model.`. Linears that are one here, and so share an A, get a copy each. Indexers
that learned beside the adapters are whole modules there (modules_to_save).

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_keye.checkpoint.adapters import holds_adapters, shapes_with_adapters
from megatron_keye.checkpoint.convert.check_tensors import check_finite, check_shapes, check_types
from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout, parameter_shapes, part_of
from megatron_keye.checkpoint.hf.safetensors_file import make_header, write_blocks
from megatron_keye.checkpoint.hf.weight_map import WeightMapping, weight_mappings
from megatron_keye.checkpoint.manifest import check_sizes, check_sums
from megatron_keye.checkpoint.saved_run import read_saved_run
from megatron_keye.config.lora import LORA_A, LORA_B, Target
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.files.partial_folder import PartialFolder

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_PEFT_NAMES = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight"}
_VISION_LAYER = r"visual\.vision_model\.encoder\.layers\.\d+\."
_MODULES: dict[Target, str] = {
    "attention": r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "experts": r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj",
    "projector": r"mlp_AR\.linear_[12]",
    "vision": _VISION_LAYER + r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
}
"""The linears of each target in the released model."""


@dataclass(frozen=True)
class _Exported:
    """A tensor of the export."""

    name: str
    shape: tuple[int, ...]
    mapping: WeightMapping
    position: int
    """Which of the mapping's parts it belongs to."""
    matrix: str
    """LORA_A or LORA_B; "" for a whole weight."""


def native_to_peft(
    native: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    checks_finite: bool = False,
    dropped: tuple[str, ...] = (),
    layout: ExpertLayout = "fused",
) -> None:
    """Export the adapters of a checkpoint.

    Args:
        native: Folder of a checkpoint of a run with adapters, saved on any grid.
        out: Folder to make; must not exist.
        dtype: Type to round to; None keeps the checkpoint's.
        checks_finite: Whether NaN and Inf are refused.
        dropped: Patterns of surplus tensors to ignore.
        layout: How the released model holds its experts. PEFT has names for adapters of linears
            alone, so that those of experts need "per-expert".

    Raises:
        UserError: When the checkpoint has no adapters, or some that PEFT has no names for, or does
            not fit its run.json; nothing is left then.
    """
    check_sums(native, check_sizes(native))
    source = NativeFolder(native)
    run = read_saved_run(native)
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    expected = shapes_with_adapters(run, shapes)
    check_shapes(shapes, expected, where=str(native), dropped=dropped)
    _check_exportable(native, shapes, run, layout)
    types = {key: source.tensors[key].dtype for key in expected}
    dtype = check_types(types, where=str(native), wanted=dtype)
    exported = list(_exported(run, source, layout))
    folder = PartialFolder(out, f"{native.resolve()} {dtype} {layout} {run.to_json()}")
    with folder.filling():
        try:
            folder.write(
                ADAPTER, lambda stream: _write(stream, exported, source, dtype, checks_finite)
            )
        except UserError:
            folder.discard()
            raise
        (folder.path / ADAPTER_CONFIG).write_text(json.dumps(_config(run), indent=2) + "\n")
        folder.finish()


def _check_exportable(native: Path, names: Any, run: RunConfig, layout: ExpertLayout) -> None:
    if not holds_adapters(names):
        raise UserError(
            f"--adapter: got {native}, which has no adapters, expected a checkpoint of a run with "
            "training.lora.rank above 0; leave --adapter out to export the whole model"
        )
    if run.training.lora.is_adapting("experts") and layout == "fused":
        raise UserError(
            "--adapter: got adapters of experts, expected linears, which alone have a name in "
            "PEFT's format, and experts are one tensor in the fused layout; add --expert-layout "
            "per-expert for a model with a linear for each expert, or leave --adapter out to "
            "merge the adapters into the weights"
        )


def _exported(run: RunConfig, source: NativeFolder, layout: ExpertLayout) -> Iterator[_Exported]:
    """Yield what is exported, in the order of the file."""
    rank, shapes = run.training.lora.rank, parameter_shapes(run.model, layout)
    for mapping in weight_mappings(run.model, layout):
        has_adapter = mapping.key.removesuffix("weight") + LORA_A in source.tensors
        for position, part in enumerate(mapping.parts):
            shape = shapes[part.name]
            if has_adapter:
                module = _PREFIX + part.name.removesuffix("weight")
                for matrix, size in ((LORA_A, (rank, shape[1])), (LORA_B, (shape[0], rank))):
                    name = module + _PEFT_NAMES[matrix]
                    yield _Exported(name, size, mapping, position, matrix)
            elif part_of(part.name) == "indexer" and "indexer" in run.training.trained_parts:
                yield _Exported(_PREFIX + part.name, shape, mapping, position, "")


def _write(
    stream: BinaryIO,
    exported: list[_Exported],
    source: NativeFolder,
    dtype: torch.dtype,
    checks_finite: bool,
) -> None:
    stream.write(make_header({each.name: each.shape for each in exported}, dtype))
    for each in exported:
        tensor = _read(each, source)
        if checks_finite:
            check_finite(each.name, tensor)
        write_blocks(stream, [tensor.to(dtype)])


def _read(each: _Exported, source: NativeFolder) -> Tensor:
    mapping = each.mapping
    key = mapping.key.removesuffix("weight") + each.matrix if each.matrix else mapping.key
    native = source.read(key, mapping.stacked_index)
    # Joined linears have the same input, and each some rows of the output.
    return native if each.matrix == LORA_A else mapping.arrangement.split(native)[each.position]


def _config(run: RunConfig) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    lora = run.training.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        # A text instead of a list is a pattern for the whole name, which leaves out namesakes.
        "target_modules": "|".join(f"({_MODULES[target]})" for target in lora.targets),
        "modules_to_save": ["sa_indexer"] if "indexer" in run.training.trained_parts else None,
    }
