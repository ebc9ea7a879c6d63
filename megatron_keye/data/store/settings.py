# SPDX-License-Identifier: Apache-2.0
"""The settings that decide the tokens of a prepared sample.

A store records them: under other settings its tokens would differ from those of a run that reads
the sample file itself.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.tokens import Tokenizer
from megatron_keye.errors import UserError


def deciding_settings(
    tokenizer: Tokenizer, config: DataConfig, model: ModelConfig
) -> dict[str, Any]:
    """Return all settings that tokens, labels and pictures depend on, by dotted name.

    The tokenizer is identified by its content, since folders move.
    """
    frames = {
        f"data.frames.{f.name}": getattr(config.frames, f.name) for f in fields(config.frames)
    }
    settings = frames | {
        "data.tokenizer": f"vocabulary {tokenizer.digest}",
        "data.loss_tokens": config.loss_tokens,
        "data.thinking": config.thinking,
        "data.trains_on_thinking": config.trains_on_thinking,
        "data.trains_on_shortened_turns": config.trains_on_shortened_turns,
        "model.vision.patch_size": model.vision.patch_size,
        "model.vision.merge_size": model.vision.merge_size,
        "model.image_token_id": model.image_token_id,
        "model.video_token_id": model.video_token_id,
        "model.vision_start_token_id": model.vision_start_token_id,
        "model.vision_end_token_id": model.vision_end_token_id,
    }
    # As read back from the store: JSON has lists in place of tuples.
    read_back: dict[str, Any] = json.loads(json.dumps(settings))
    return read_back


def check_settings(store: Path, prepared: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a store that was prepared under other settings.

    Args:
        store: The store, for the message.
        prepared: Settings that it was made with.
        wanted: Settings of the run.

    Raises:
        UserError: Naming every setting that differs, with both values.
    """
    names = sorted(prepared.keys() | wanted.keys())
    differing = [
        f"{name}: got {wanted.get(name)!r}, expected {prepared.get(name)!r}"
        for name in names
        if prepared.get(name) != wanted.get(name)
    ]
    if differing:
        raise UserError(
            f"data.samples: {store} was prepared under other settings: {'; '.join(differing)}; "
            "prepare the samples again with these settings, or run with those of the store"
        )
