# SPDX-License-Identifier: Apache-2.0
"""Synthetic rows with a realistic mix of sample lengths, from short texts to two-hour videos."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_keye.estimate.workload import PictureSizes, RowShape

_PATCHES_PER_TOKEN = 4
_DRAWN_AT_ONCE = 1024
"""Samples."""


@dataclass(frozen=True)
class _Kind:
    """One kind of sample in the mix. Ranges are of log-uniform distributions."""

    name: str
    share: float
    """Share of all samples."""
    text: tuple[int, int]
    """Range of text tokens."""
    pictures: tuple[int, int] = (0, 0)
    """Range of pictures."""
    tokens: tuple[int, int] = (0, 0)
    """Range of tokens per picture, which are equal within a sample."""


# At 2 frames per second; long videos are limited to 184,320 tokens (data.frames), which leaves 102
# tokens per frame for 15 minutes and 2,880 frames of 64 tokens for 2 hours.
_MIX = (
    _Kind("text", 0.45, (200, 16_000)),
    _Kind("images", 0.35, (50, 1_000), (1, 4), (64, 4_096)),
    _Kind("15 s clips", 0.17, (50, 500), (30, 30), (64, 256)),
    _Kind("15 min videos", 0.02, (100, 2_000), (1_800, 1_800), (64, 102)),
    _Kind("2 h videos", 0.01, (100, 4_000), (2_880, 2_880), (64, 64)),
)


def draw_rows(generator: np.random.Generator, count: int, row_tokens: int) -> list[RowShape]:
    """Draw samples of the mix and pack them, in order, into `count` rows of `row_tokens`.

    Samples that are longer than a row are left out.
    """
    rows: list[RowShape] = []
    samples: list[_Sample] = []
    filled = 0
    while True:
        for sample in _draw_samples(generator):
            if sample.length > row_tokens:
                continue  # Training refuses such a sample.
            if filled + sample.length > row_tokens:
                rows.append(_row(samples, row_tokens))
                samples, filled = [], 0
                if len(rows) == count:
                    return rows
            samples.append(sample)
            filled += sample.length


class _Sample(NamedTuple):
    num_pictures: int
    picture_tokens: int
    length: int


def _draw_samples(generator: np.random.Generator) -> Iterator[_Sample]:
    kinds = generator.choice(len(_MIX), _DRAWN_AT_ONCE, p=[kind.share for kind in _MIX])

    def draw(name: Literal["text", "pictures", "tokens"]) -> NDArray[np.int64]:
        low, high = np.array([getattr(kind, name) for kind in _MIX])[kinds].T
        exponents = generator.uniform(np.log(np.maximum(low, 1)), np.log(np.maximum(high, 1)))
        return np.where(high > 0, np.exp(exponents).round(), 0).astype(np.int64)

    text, tokens, pictures = draw("text"), draw("tokens"), draw("pictures")
    # Each picture is enclosed by a start and an end token.
    lengths = text + pictures * (tokens + 2)
    return map(_Sample, pictures.tolist(), tokens.tolist(), lengths.tolist())


def _row(samples: list[_Sample], row_tokens: int) -> RowShape:
    starts, tokens, filled = [], [], 0
    for sample in samples:
        step = sample.picture_tokens + 2
        starts.append(filled + 1 + step * np.arange(sample.num_pictures))
        tokens.append(np.full(sample.num_pictures, sample.picture_tokens))
        filled += sample.length
    padding = row_tokens - filled
    of_pictures = np.concatenate(tokens)
    pictures = PictureSizes(np.concatenate(starts), _PATCHES_PER_TOKEN * of_pictures, of_pictures)
    lengths = tuple(sample.length for sample in samples)
    documents = (*lengths, padding) if padding else lengths
    return RowShape(document_lengths=documents, pictures=pictures, num_padding=padding)
