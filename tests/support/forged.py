# SPDX-License-Identifier: Apache-2.0
"""Few forged clips, and a run of the small model that reads them."""

from pathlib import Path
from typing import Any

from megatron_keye.config import RunConfig
from megatron_keye.production.forged.forge import forge
from megatron_keye.production.forged.options import ForgeOptions
from megatron_keye.recipes.keye_tiny_grounding import keye_tiny_grounding


def forge_few(folder: Path, **options: Any) -> Path:
    """Forge two clips to train on and four others, with a tokenizer, and return the folder."""
    few: dict[str, Any] = {"num_clips": 2, "num_held_out": 4, "seed": 0}
    shown: dict[str, Any] = {"kinds": ("when", "at"), "width": 56, "height": 56, "most_shapes": 2}
    times: dict[str, Any] = {"shortest_seconds": 6.0, "longest_seconds": 8.0}
    times |= {"frames_per_second": 1.0, "variable_share": 0.0, "writes_tokenizer": True}
    forge(folder, ForgeOptions(**(few | shown | times | options)), num_workers=1)
    return folder


def run_on_clips(folder: Path, *settings: str) -> RunConfig:
    """Return the small run of one rank on clips that `forge_few` has made."""
    return keye_tiny_grounding(num_ranks=1, has_gpu=False).with_overrides(
        [
            f"data.samples={folder / 'train.jsonl'}",
            f"data.validation={folder / 'held_out.jsonl'}",
            f"data.tokenizer={folder / 'tokenizer'}",
            f"training.evaluation.samples={folder / 'held_out.questions.jsonl'}",
            f"output_dir={folder / 'runs'}",
            "device=cpu",
            "model.decoder.num_layers=1",
            *settings,
        ]
    )
