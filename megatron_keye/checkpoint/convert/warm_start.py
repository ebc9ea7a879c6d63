# SPDX-License-Identifier: Apache-2.0
"""Makes a first Keye-VL checkpoint from a text model and, if given, a vision encoder.

The decoder comes from Qwen3-30B-A3B, the ViT from a Keye-VL-1.5 or SigLIP folder. Projector and
indexers exist in neither and are initialized.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_keye.checkpoint.convert.carried_files import check_files_from
from megatron_keye.checkpoint.convert.check_tensors import check_shapes, check_types
from megatron_keye.checkpoint.convert.convert import Options, write_native
from megatron_keye.checkpoint.convert.sources import FreshTensor, MixedSource
from megatron_keye.checkpoint.convert.to_native import NativeMaker
from megatron_keye.checkpoint.hf.config import CONFIG, check_config
from megatron_keye.checkpoint.hf.config_fields import QWEN, VISION_ENCODER
from megatron_keye.checkpoint.hf.folder import open_unquantised
from megatron_keye.checkpoint.hf.parameter_shapes import layout_of, parameter_shapes, part_of
from megatron_keye.checkpoint.hf.safetensors_index import Entry
from megatron_keye.checkpoint.history import HISTORY, PastRun, text_of
from megatron_keye.config.parts import Part
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

ORIGINS = "origins.json"
"""File in the new checkpoint: the origin of each tensor."""
_VISION = "visual.vision_model."
_VISION_PREFIXES = (_VISION, "vision_model.")
"""The ViT's names in Keye-VL folders and in SigLIP's."""
_VISION_STD = 0.02


def warm_start(
    qwen: Path,
    vision: Path | None,
    out: Path,
    run: RunConfig,
    options: Options,
    *,
    files_from: Path | None = None,
) -> dict[str, str]:
    """Make a native checkpoint that training can start from.

    Args:
        qwen: Folder of a Qwen3 mixture-of-experts model with the recipe's decoder sizes.
        vision: Folder with a ViT of the recipe's sizes; None initializes the ViT too.
        out: Folder to make; must not exist.
        run: Sizes and seed.
        options: How to convert.
        files_from: Folder whose small files are added to those of `qwen`, or replace them.

    Returns:
        The origin of each tensor: a file, or "fresh".

    Raises:
        UserError: When a folder does not fit or is damaged; nothing is left then.
    """
    if files_from is not None:
        check_files_from(files_from)
    entries = open_unquantised(qwen)
    check_config(qwen / CONFIG, run.model, QWEN)
    layout = layout_of(entries)
    shapes = parameter_shapes(run.model, layout)
    decoder = {name: shape for name, shape in shapes.items() if part_of(name) == "decoder"}
    got = {name: entry.shape for name, entry in entries.items()}
    check_shapes(got, decoder, where=str(qwen), dropped=options.dropped)
    found: dict[str, Entry] = {name: entries[name] for name in decoder}
    if vision is not None:
        found |= _vision_entries(vision, shapes, run)
    types = {name: entry.dtype for name, entry in found.items()}
    where = str(qwen) if vision is None else f"{qwen} and {vision}"
    dtype = check_types(types, where=where, wanted=options.dtype)
    origins = {name: found.get(name) or _fresh(name, shapes[name], run) for name in shapes}
    maker = NativeMaker(run.model, layout, MixedSource(origins), dtype, options.checks_finite)
    sources = sorted({entry.file for entry in found.values()})
    described = {name: _describe(origin) for name, origin in origins.items()}
    report = json.dumps(described, indent=2) + "\n"
    parts: list[Part] = ["decoder"] if vision is None else ["vision", "decoder"]
    text_model = PastRun(run=qwen.resolve().name, phase="dense", steps=0, trained=parts)
    notes = {ORIGINS: report, HISTORY: text_of([text_model])}
    carried = [qwen] if files_from is None else [qwen, files_from]
    write_native(maker, out, run, sources, options, carried_from=carried, notes=notes)
    return described


def _vision_entries(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], run: RunConfig
) -> dict[str, Entry]:
    """Return the ViT's tensors under our names; the folder may have others."""
    entries = open_unquantised(folder, prefixes=_VISION_PREFIXES)
    prefix = next((p for p in _VISION_PREFIXES if any(n.startswith(p) for n in entries)), None)
    if prefix is None:
        raise UserError(
            f"{folder}: got no tensor below {' or '.join(_VISION_PREFIXES)}, expected a Keye-VL "
            "or SigLIP folder; correct --vision or leave it out"
        )
    renamed = {
        _VISION + name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    check_config(folder / CONFIG, run.model, VISION_ENCODER)
    wanted = {name: shape for name, shape in shapes.items() if part_of(name) == "vision"}
    held = {name: renamed[name] for name in wanted if name in renamed}
    # SigLIP has no packing table, which is unused: like all that is absent, it is initialized.
    needed = {name: s for name, s in wanted.items() if name in held or ".packing_" not in name}
    got = {name: entry.shape for name, entry in held.items()}
    check_shapes(got, needed, where=str(folder))
    return held


def _fresh(name: str, shape: tuple[int, ...], run: RunConfig) -> FreshTensor:
    is_vision = part_of(name) == "vision"
    std = _VISION_STD if is_vision else run.model.decoder.init_std
    return FreshTensor(shape, std, run.training.seed)


def _describe(origin: Entry | FreshTensor) -> str:
    return str(origin.file) if isinstance(origin, Entry) else "fresh"
