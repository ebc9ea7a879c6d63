# SPDX-License-Identifier: Apache-2.0
"""Sizes and cropping in parameter sets; test_segment.py decodes streams that were uncropped."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest

from megatron_keye.data.bitstream.cropping import without_cropping
from megatron_keye.data.bitstream.description import Description, describe, nal_units_in_front
from megatron_keye.data.bitstream.sps import Sps
from tests.support.clips import make_clip

X265 = "log-level=none:min-cu-size=16:ctu=32"
CODECS = [
    ("libx264", {"profile": "baseline"}),
    ("libx264", {"x264-params": "cqm=jvt:nal-hrd=vbr:vbv-maxrate=900:vbv-bufsize=900"}),
    ("libx265", {"x265-params": X265}),
    ("libx265", {"x265-params": X265 + ":temporal-layers=3"}),
]


def described(path: Path) -> Description:
    with av.open(str(path)) as container:
        return describe(container.streams.video[0])


def describe_as(
    made: Description, extradata: bytes, size: tuple[int, int] | None = None
) -> Description:
    """Describe the same stream with other extradata, in a container of `size`."""
    assert made.sps is not None
    height, width = size or (made.sps.height, made.sps.width)
    stream: Any = SimpleNamespace(
        codec_context=SimpleNamespace(name=made.codec, extradata=extradata),
        height=height,
        width=width,
    )
    return describe(cast("av.VideoStream", stream))


def uncropped_sps(made: Description, extradata: bytes) -> Sps:
    """Read the SPS of a 384 x 144 stream whose cropping was removed."""
    found = describe_as(made, extradata, (144, 384)).sps
    assert found is not None
    return found


@pytest.mark.parametrize(("codec", "options"), CODECS)
def test_sizes_are_read_and_cropping_is_taken_out(
    tmp_path: Path, codec: str, options: dict[str, str]
) -> None:
    for cut_rows, cut_columns in ((0, 0), (8, 0), (2, 0), (0, 6), (14, 10)):
        path = tmp_path / f"{cut_rows}_{cut_columns}.mp4"
        made = described(
            make_clip(
                path,
                12,
                scale=3,
                cut_rows=cut_rows,
                cut_columns=cut_columns,
                codec=codec,
                options=options,
            )
        )
        found = made.sps
        assert found is not None
        assert (found.stored_height, found.stored_width) == (144, 384)
        assert (found.height, found.width) == (144 - cut_rows, 384 - cut_columns)
        assert found.is_cropped is bool(cut_rows or cut_columns)
        whole = uncropped_sps(made, made.uncropped)
        assert not whole.is_cropped and (whole.height, whole.width) == (144, 384)
        assert (made.uncropped == made.extradata) is not found.is_cropped


@pytest.mark.parametrize(("codec", "options"), CODECS)
def test_only_the_cropping_differs(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    """What an encoder writes for the whole frame is what is left of the cropped one's set."""
    sets = []
    for cut_rows in (0, 8):
        path = tmp_path / f"{cut_rows}.ts"
        made = described(
            make_clip(path, 12, scale=3, cut_rows=cut_rows, codec=codec, options=options)
        )
        # For both, since FFmpeg declares a cropping of 0 where an encoder declares none.
        sets.append(uncropped_sps(made, without_cropping(made.codec, made.extradata)).nal_unit)
    assert sets[0] == sets[1]


def test_parameters_in_front_are_needed(tmp_path: Path) -> None:
    made = described(make_clip(tmp_path / "clip.mp4", 2, scale=3, cut_rows=8))
    assert made.sps is not None
    for extradata, num_sets in ((b"", 0), (b"\1", 0), (b"\0\0\1" + made.extradata, 0)):
        with pytest.raises(ValueError, match=f"it has {num_sets} sequence parameter sets"):
            describe_as(made, extradata)
    behind_code = b"\0\0\1" + made.sps.nal_unit
    other = b"".join(b"\0\0\1" + unit for unit in nal_units_in_front("h264", made.uncropped))
    with pytest.raises(ValueError, match="it has 2 sequence parameter sets"):
        describe_as(made, behind_code + other)
    with pytest.raises(
        ValueError, match="384, 144. pixels across and down, its container .384, 1"
    ):
        describe_as(made, other)


def test_cropping_that_cannot_be_removed_is_reported(tmp_path: Path) -> None:
    codec, options = CODECS[2]
    path = make_clip(tmp_path / "c.mp4", 2, scale=3, cut_rows=8, codec=codec, options=options)
    made = described(path)
    assert made.sps is not None
    with pytest.raises(ValueError, match="^its cropping can't be removed"):
        describe_as(made, b"\0\0\1" + made.sps.nal_unit)  # Without its VPS.


@pytest.mark.parametrize(("codec", "options"), CODECS)
def test_damage_is_found(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    path = make_clip(tmp_path / "c.mp4", 12, scale=3, cut_rows=8, codec=codec, options=options)
    made = described(path)
    assert made.sps is not None
    end = made.extradata.index(made.sps.nal_unit) + len(made.sps.nal_unit)
    for length in range(end):
        with pytest.raises(ValueError, match=r"^its |^it has "):
            describe_as(made, made.extradata[:length])
    generator = np.random.default_rng(0)
    for _ in range(1000):
        damaged = np.frombuffer(made.extradata, dtype=np.uint8).copy()
        damaged[generator.integers(0, end, 3)] = generator.integers(0, 256, 3)
        try:
            found = describe_as(made, damaged.tobytes()).sps
        except ValueError:
            continue
        # Whatever else it declares now, the size is the container's, and the stored size holds it.
        assert found is not None and (found.height, found.width) == (136, 384)
        assert found.stored_height >= 136 and found.stored_width >= 384
