# SPDX-License-Identifier: Apache-2.0
"""A model and rows small enough to train in a test, with every part of the released one."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_keye.config import (
    DataConfig,
    DecoderConfig,
    DecoderParallel,
    ExpertsConfig,
    IndexerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
    VisionParallel,
)
from megatron_keye.data.media import Medium
from megatron_keye.data.row import IGNORED_LABEL, PackedRow, Picture
from megatron_keye.data.video.decode_service import DecodeStatistics

IMAGE, VIDEO, START, END = 90, 91, 92, 93
ROW_TOKENS = 64
PATCH = 4


def tiny_model(**decoder: object) -> ModelConfig:
    """Return a model whose sizes are divisible by two along every axis of parallelism."""
    sizes = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 16,
        "vocab_size": 96,
        "experts": ExpertsConfig(
            num_experts=4, num_experts_per_token=2, intermediate_size=24, balance_loss_weight=0.01
        ),
        "indexer": IndexerConfig(num_heads=4, head_dim=8, top_k=12),
        "rope_sections": (2, 2, 4),
        "rope_theta": 10_000.0,
        "init_std": 0.2,
    }
    return ModelConfig(
        vision=VisionConfig(
            num_layers=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            patch_size=PATCH,
            image_size=16,
        ),
        decoder=DecoderConfig(**(sizes | decoder)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def tiny_run(
    *,
    vision_ranks: int = 0,
    shared_micro_batches: int = 0,
    chunk_patches: int = 40,
    model: ModelConfig | None = None,
    training: dict[str, object] | None = None,
    device: str = "cpu",
    **decoder_degrees: int,
) -> RunConfig:
    """Return a run of the tiny model; vision is dedicated if `vision_ranks` is above 0."""
    options: dict[str, object] = {
        "steps": 8,
        "rows_per_step": 4,
        "precision": "fp32",
        # A large epsilon, since the sign of tiny gradients depends on rounding.
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2, epsilon=1e-4),
    }
    return RunConfig(
        name="tiny",
        model=model or tiny_model(),
        data=DataConfig(samples="none", row_tokens=ROW_TOKENS),
        parallel=ParallelConfig(
            decoder=DecoderParallel(**decoder_degrees),
            vision=VisionParallel(
                placement="dedicated" if vision_ranks else "colocated",
                num_ranks=vision_ranks,
                shared_micro_batches=shared_micro_batches,
                chunk_patches=chunk_patches,
            ),
        ),
        training=TrainingConfig(**(options | (training or {}))),
        device=device,
    )


def packed_row(seed: int, *documents: tuple[int, tuple[tuple[int, int], ...]]) -> PackedRow:
    """Return a row of random documents.

    Args:
        seed: Seed of tokens and pictures.
        documents: Number of text tokens and patch grids of the pictures of each document; the
            pictures come first, each between vision start and end.
    """
    generator = np.random.default_rng(seed)
    tokens: list[int] = []
    labels: list[int] = []
    bounds, pictures, starts = [0], [], []
    for number, (num_text, patch_grids) in enumerate(documents):
        ids: list[int] = []
        for index, patch_grid in enumerate(patch_grids):
            starts.append(len(tokens) + len(ids) + 1)
            medium = Medium(f"{seed}-{number}", "video")
            pictures.append(Picture(medium=medium, frame=index, patch_grid=patch_grid))
            ids += [START, *[VIDEO] * (patch_grid[0] * patch_grid[1] // 4), END]
        text = generator.integers(0, 90, num_text).tolist()
        ids += text
        following = [*ids[1:], 0]
        first = len(ids) - num_text
        labels += [IGNORED_LABEL] * first + following[first:-1] + [IGNORED_LABEL] * (num_text > 0)
        tokens += ids
        bounds.append(len(tokens))
    padding = ROW_TOKENS - len(tokens)
    assert padding >= 0, f"got {len(tokens)} tokens, expected at most {ROW_TOKENS}"
    return PackedRow(
        token_ids=np.array(tokens + [0] * padding, dtype=np.int64),
        labels=np.array(labels + [IGNORED_LABEL] * padding, dtype=np.int64),
        weights=np.ones(ROW_TOKENS, dtype=np.float32),
        document_bounds=np.array([*bounds, ROW_TOKENS][: None if padding else -1], dtype=np.int64),
        num_real_tokens=len(tokens),
        pictures=tuple(pictures),
        picture_starts=tuple(starts),
        sample_names=tuple(f"sample {seed}-{n}" for n in range(len(documents))),
    )


def mixed_rows(step: int) -> list[PackedRow]:
    """Return a global batch with one large video, packed documents, text only, and padding."""
    seed = 10 * step
    return [
        packed_row(seed, (12, ((4, 6), (4, 6), (2, 4), (2, 2)))),
        packed_row(seed + 1, (20, ()), (9, ()), (35, ())),
        packed_row(seed + 2, (10, ((4, 4),)), (15, ((2, 2), (2, 2))), (10, ())),
        packed_row(seed + 3, (30, ())),
    ]


def text_rows(step: int) -> list[PackedRow]:
    """Return a global batch without pictures."""
    return [packed_row(100 + 10 * step + row, (40, ()), (20, ())) for row in range(4)]


class SyntheticPatches:
    """Replaces the decode service without reading files; those named "damaged" fail."""

    def __init__(self) -> None:
        self._chunks: deque[Sequence[Picture]] = deque()
        self._failed: deque[dict[str, str]] = deque()

    def start_step(self, chunks: Sequence[Sequence[Picture]]) -> None:
        self._chunks.extend(chunks)
        media = {picture.medium.path for chunk in chunks for picture in chunk}
        self._failed.append({name: "is damaged" for name in media if "damaged" in name})

    def wait_until_decoded(self) -> dict[str, str]:
        return self._failed.popleft()

    def take(self) -> Tensor:
        return synthetic_patches(self._chunks.popleft())

    def statistics(self) -> DecodeStatistics:
        return DecodeStatistics()

    def close(self) -> None:
        pass


def synthetic_patches(pictures: Sequence[Picture]) -> Tensor:
    """Return random patches of pictures, seeded by the file's name and the frame."""
    parts = []
    for picture in pictures:
        seed = sum(map(ord, picture.medium.path)) * 1000 + picture.frame
        generator = torch.Generator().manual_seed(seed)
        size = (picture.num_patches, 3, PATCH, PATCH)
        parts.append(torch.rand(size, generator=generator) * 2 - 1)
    return torch.cat(parts)
