# SPDX-License-Identifier: Apache-2.0
"""Long videos are as long as asked for, with every picture at its time."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_keye.data.video.probe import probe
from tests.support.clips import make_clip
from tools.make_long_video import main


def test_short_and_repeated_videos_have_even_times(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", 10)
    out = tmp_path / "out"
    assert main([str(out), "--seconds", "3", "150", "--clip", str(clip), "--rate", "2"]) == 0
    for seconds, frames in ((3, 6), (150, 360)):
        times = probe(out / f"{seconds}s.mp4").times
        # A repeated minute is repeated whole.
        assert np.allclose(times, np.arange(frames) / 2)
        sample = json.loads((out / f"{seconds}s.jsonl").read_text())
        assert sample["messages"][0]["content"][0]["video"] == f"{seconds}s.mp4"


def test_a_missing_clip_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--clip", str(tmp_path / "none.mp4")]) == 2
    assert "none.mp4" in capsys.readouterr().err
