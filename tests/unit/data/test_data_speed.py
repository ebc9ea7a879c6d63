# SPDX-License-Identifier: Apache-2.0
"""Lower bounds on the rates of preparing and loading, far below those of an idle core.

A decoder takes at most 150,000 tokens/s; every rank makes the rows of all ranks, so loading has to
be much faster. Measured on two busy cores: 0.9 to 2.3 million tokens/s.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_keye.config import DataConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.store.make import make_store
from tests.support.clips import make_clip, tiny_model

SAMPLES_PER_SECOND = 30
TOKENS_PER_SECOND = 300_000
CONFIG = DataConfig(samples="none", row_tokens=32_768)
MODEL = tiny_model()


def write_samples(folder: Path, num_samples: int) -> Path:
    """Write questions about windows of two clips, two in five without a clip."""
    for name, num_frames in (("a.mp4", 250), ("b.mp4", 1_000)):
        make_clip(folder / name, num_frames, options={"preset": "ultrafast"})
    generator = np.random.default_rng(0)
    words = ["rabbit", "crawls", "out", "of", "a", "dark", "burrow", "and", "yawns"]
    lines = []
    for number in range(num_samples):
        question = " ".join(generator.choice(words, int(generator.integers(5, 40))))
        answer = " ".join(generator.choice(words, int(generator.lognormal(4, 0.8)) + 1))
        parts = [{"type": "text", "text": question}]
        if number % 5 < 3:
            start = int(generator.integers(0, 6))
            end = start + int(generator.integers(2, 30))
            video = {"type": "video", "video": "ab"[number % 2] + ".mp4"}
            parts.insert(0, video | {"start": start, "end": end})
        turns = [("user", parts), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}))
    path = folder / "s.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_preparing_and_loading_keep_up(tmp_path: Path) -> None:
    samples, out = write_samples(tmp_path, 1_000), tmp_path / "out"
    report = make_store(samples, out, CONFIG, MODEL, num_workers=1, skips_bad=False)
    assert report["samples_per_second"] > SAMPLES_PER_SECOND
    for row_tokens, num_rows in ((32_768, 16), (262_144, 4)):
        config = dataclasses.replace(
            CONFIG, samples=str(out), row_tokens=row_tokens, packing_window=64
        )
        loader = RowLoader(config, MODEL, seed=0)
        loader.next_rows(1)
        started = time.perf_counter()
        rows = loader.next_rows(num_rows)
        seconds = time.perf_counter() - started
        num_tokens = sum(row.num_real_tokens for row in rows)
        assert num_tokens > 0.99 * num_rows * row_tokens, "too much padding"
        assert num_tokens / seconds > TOKENS_PER_SECOND
