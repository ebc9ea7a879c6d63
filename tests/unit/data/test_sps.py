"""Taking the cropping out of H.264's description; test_segment.py decodes what comes of it."""

from pathlib import Path

import av
import numpy as np

from megatron_keye.data.sps import uncrop
from tests.support.clips import make_clip


def extradata_of(path: Path) -> bytes:
    with av.open(str(path)) as container:
        return bytes(container.streams.video[0].codec_context.extradata or b"")


def test_what_is_not_cropped_is_left_alone(tmp_path: Path) -> None:
    whole = extradata_of(make_clip(tmp_path / "whole.mp4", 2, scale=3))
    cropped = extradata_of(make_clip(tmp_path / "cropped.mp4", 2, scale=3, cut_rows=8))
    assert uncrop(whole) is None
    found = uncrop(cropped)
    assert found is not None and (found.height, found.width) == (144, 384)
    assert uncrop(found.extradata) is None, "something is left to take out"


def test_other_records_are_left_alone(tmp_path: Path) -> None:
    hevc = make_clip(
        tmp_path / "clip.mp4", 2, codec="libx265", options={"x265-params": "log-level=none"}
    )
    stream = make_clip(tmp_path / "clip.ts", 12, scale=3, cut_rows=8)
    for extradata in (b"", b"\1", extradata_of(hevc), extradata_of(stream)):
        assert uncrop(extradata) is None


def test_damage_is_no_crash(tmp_path: Path) -> None:
    whole = extradata_of(make_clip(tmp_path / "cropped.mp4", 2, scale=3, cut_rows=8))
    generator = np.random.default_rng(0)
    for length in range(len(whole)):
        uncrop(whole[:length])
    for _ in range(2000):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        places = generator.integers(6, len(damaged), 3)
        damaged[places] = generator.integers(0, 256, 3)
        found = uncrop(damaged.tobytes())
        assert found is None or found.height % 16 == found.width % 16 == 0
