# SPDX-License-Identifier: Apache-2.0
"""Forged clips are the same files whenever they are written."""

import io

import numpy as np

from megatron_keye.production.forged.clip import write_clip


def test_the_same_frames_give_the_same_bytes() -> None:
    # What an encoder leaves undecided shows in few clips, and where memory lies elsewhere.
    generator = np.random.default_rng(0)
    kept = []
    for _ in range(30):
        blocks = generator.integers(8, 248, (17, 10, 12, 3)).repeat(8, axis=1).repeat(8, axis=2)
        frames = (blocks + generator.integers(-8, 8, blocks.shape)).astype(np.uint8)
        written = set()
        for _ in range(8):
            kept.append(bytearray(generator.integers(1, 200_000)))
            file = io.BytesIO()
            write_clip(file, frames.copy(), range(0, 40 * len(frames), 40))
            written.add(file.getvalue())
        assert len(written) == 1
