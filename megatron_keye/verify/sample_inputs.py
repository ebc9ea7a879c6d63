# SPDX-License-Identifier: Apache-2.0
"""Default inputs for comparing two models."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config import ModelConfig

Arrays = dict[str, NDArray[Any]]

_TEXT_TOKENS = 48
"""Long enough for positions to matter, short enough for a CPU."""


def sample_text(model: ModelConfig, seed: int) -> Arrays:
    """Return one document of random text, no longer than top-k, with targets."""
    generator = np.random.default_rng(seed)
    length = min(_TEXT_TOKENS, model.decoder.indexer.top_k)
    token_ids = _text(model, generator, length)
    return {"input_ids": token_ids, "targets": np.append(token_ids[1:], -100)}


def sample_multimodal(model: ModelConfig, seed: int) -> Arrays:
    """Return a document with an image and two frames and one of text, packed, with targets."""
    generator = np.random.default_rng(seed)
    side, merge = model.vision.patch_size, model.vision.merge_size
    image, frame = (2 * merge, 3 * merge), (merge, 2 * merge)
    parts = [_text(model, generator, _TEXT_TOKENS // 2)]
    for token_id, (height, width) in (
        (model.image_token_id, image),
        (model.video_token_id, frame),
        (model.video_token_id, frame),
    ):
        pad = np.full(height * width // merge**2, token_id)
        start, end = (
            np.array([i]) for i in (model.vision_start_token_id, model.vision_end_token_id)
        )
        parts += [start, pad, end, _text(model, generator, 4)]
    first = np.concatenate(parts)
    token_ids = np.concatenate([first, _text(model, generator, _TEXT_TOKENS // 2)])

    def patches(patch_grids: list[tuple[int, int]]) -> NDArray[np.float32]:
        count = sum(height * width for height, width in patch_grids)
        return generator.uniform(-1, 1, (count, 3, side, side)).astype(np.float32)

    return {
        "input_ids": token_ids,
        "pixel_values": patches([image]),
        "image_grid_thw": np.array([(1, *image)]),
        "pixel_values_videos": patches([frame, frame]),
        "video_grid_thw": np.array([(1, *frame)] * 2),
        "cu_seqlens": np.array([0, len(first), len(token_ids)]),
        "targets": np.append(token_ids[1:], -100),
    }


def _text(model: ModelConfig, generator: np.random.Generator, length: int) -> NDArray[np.int64]:
    """Return random token ids, none a placeholder."""
    drawn = generator.integers(0, model.decoder.vocab_size - len(model.vision_token_ids), length)
    for placeholder in sorted(model.vision_token_ids):
        drawn += drawn >= placeholder
    return drawn
