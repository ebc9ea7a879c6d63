"""Synthetic rows with a realistic mix of sample lengths, from short texts to two-hour videos."""

from dataclasses import dataclass

import numpy as np

from megatron_keye.estimate.forecast import RowShape
from megatron_keye.plan.step import PictureSlot

_PATCHES_PER_TOKEN = 4


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
    """Draw samples of the mix and pack them, in order, into `count` rows of `row_tokens`."""
    rows: list[RowShape] = []
    lengths: list[int] = []
    pictures: list[PictureSlot] = []
    while len(rows) < count:
        text, sizes = _draw_sample(generator)
        # Each picture is enclosed by a start and an end token.
        length = text + sum(size + 2 for size in sizes)
        filled = sum(lengths)
        if filled + length > row_tokens:
            rows.append(_row(lengths, pictures, row_tokens))
            lengths, pictures, filled = [], [], 0
        start = filled + 1
        for size in sizes:
            pictures.append(
                PictureSlot(
                    row=0,
                    index=0,
                    start=start,
                    num_patches=_PATCHES_PER_TOKEN * size,
                    num_tokens=size,
                )
            )
            start += size + 2
        lengths.append(length)
    return rows


def _draw_sample(generator: np.random.Generator) -> tuple[int, list[int]]:
    kind = _MIX[int(generator.choice(len(_MIX), p=[kind.share for kind in _MIX]))]

    def draw(low: int, high: int) -> int:
        return round(np.exp(generator.uniform(np.log(low), np.log(high)))) if high else 0

    return draw(*kind.text), [draw(*kind.tokens)] * draw(*kind.pictures)


def _row(lengths: list[int], pictures: list[PictureSlot], row_tokens: int) -> RowShape:
    padding = row_tokens - sum(lengths)
    documents = (*lengths, padding) if padding else tuple(lengths)
    return RowShape(document_lengths=documents, pictures=tuple(pictures), num_padding=padding)
