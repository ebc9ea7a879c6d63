# SPDX-License-Identifier: Apache-2.0
"""Which files go to the GPU: each reason against it, with a file that has it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from megatron_keye.config.backends import decode_backend
from megatron_keye.data.bitstream.description import describe
from megatron_keye.data.bitstream.nal_units import is_random_access_point
from megatron_keye.data.bitstream.vp9 import has_size, shows_earlier_frame
from megatron_keye.data.video.color import BT709, to_space_of
from megatron_keye.data.video.gpu_rules import timeline_unsupported_reason
from megatron_keye.data.video.probe import probe
from tests.support.clips import BIG_BUCK_BUNNY, BIKES, make_clip, real_clip, rewrite

X265 = {"x265-params": "log-level=none"}


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ({}, ""),
        ({"codec": "libx265", "options": X265}, ""),
        ({"codec": "libvpx-vp9", "options": {"deadline": "realtime"}, "suffix": "webm"}, ""),
        ({"milliseconds": [0, 40, 500, 510]}, ""),
        ({"rotation": 90}, ""),
        ({"color_space": 1}, ""),
        ({"pixel_format": "yuvj420p"}, ""),
        ({"suffix": "ts"}, ""),
        ({"suffix": "ts", "codec": "libx265", "options": X265}, ""),
        ({"options": {"x264-params": "repeat-headers=1:annexb=0"}}, ""),
        ({"cut_rows": 8}, ""),
        ({"cut_rows": 8, "suffix": "mkv"}, ""),
        ({"cut_rows": 2, "codec": "libx265", "options": X265}, ""),
        ({"cut_rows": 2, "cut_columns": 6, "codec": "libx265", "options": X265}, ""),
        (
            {"cut_rows": 8, "codec": "libx265", "options": X265},
            "it stores 512 x 184 pixels, expected multiples of 16",
        ),
        ({"cut_rows": 8, "suffix": "ts"}, ""),
        ({"cut_rows": 2, "suffix": "ts", "codec": "libx265", "options": X265}, ""),
        ({"cut_rows": 8, "options": {"x264-params": "repeat-headers=1:annexb=0"}}, ""),
        (
            {"options": {"x264-params": "crop-rect=8,0,0,0"}},
            "its pictures are cropped at the left",
        ),
        ({"options": {"x264-params": "fake-interlaced=1"}}, "its pictures may be fields"),
        ({"codec": "libvpx-vp9", "cut_rows": 8, "suffix": "webm"}, ""),
        ({"codec": "libvpx-vp9", "cut_rows": 4, "suffix": "webm"}, "it has 512 x 188 pixels"),
        ({"scale": 1}, "it has 128 x 48 pixels"),
        ({"codec": "mpeg4"}, "its codec is mpeg4"),
        ({"pixel_format": "yuv420p10le"}, "its pixels are yuv420p10le"),
        ({"pixel_format": "yuv422p"}, "its pixels are yuv422p"),
        ({"color_space": 9}, "its colour space is FFmpeg's 9"),
        ({"options": {"flags": "+ilme+ildct", "x264-params": "interlaced=1"}}, "it is interlaced"),
    ],
)
def test_files_go_to_the_gpu_or_have_a_reason_not_to(
    tmp_path: Path, clip: dict[str, Any], reason: str
) -> None:
    clip = {"scale": 4} | clip
    path = make_clip(tmp_path / f"clip.{clip.pop('suffix', 'mp4')}", 12, **clip)
    found = probe(path).gpu_unsupported_reason
    assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize("name", [BIG_BUCK_BUNNY, BIKES])
def test_ordinary_videos_go_to_the_gpu(name: str) -> None:
    assert probe(real_clip(name)).gpu_unsupported_reason == ""


@pytest.mark.parametrize("changed", [range(1, 10), [2]])
@pytest.mark.parametrize("cut_rows", [0, 2])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_parameters_that_change_inside_go_to_the_cpu(
    tmp_path: Path, codec: str, cut_rows: int, changed: Sequence[int]
) -> None:
    options = {"g": "5"} | (X265 if codec == "libx265" else {})
    first, second = (
        make_clip(tmp_path / f"{cut}.mp4", 10, scale=4, cut_rows=cut, codec=codec, options=options)
        for cut in (cut_rows, 6)
    )
    with av.open(str(second)) as container:
        found = describe(container.streams.video[0]).sps
    assert found is not None
    sps = len(found.nal_unit).to_bytes(4, "big") + found.nal_unit
    path = rewrite(first, tmp_path / "clip.mp4", lambda place, old: sps * (place in changed) + old)
    assert probe(path).gpu_unsupported_reason == "its parameters change inside"


def test_a_trimmed_file_goes_to_the_cpu(tmp_path: Path) -> None:
    """Frames before an edit list's start are stored, but not shown."""
    plain = make_clip(tmp_path / "plain.mp4", 10, scale=3, options={"bf": "0"})
    path = tmp_path / "clip.mp4"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts -= 5 * 640
                packet.dts -= 5 * 640
                packet.stream = stream
                target.mux(packet)
    info = probe(path)
    assert info.num_frames < 10, "the clip was not trimmed"
    assert info.gpu_unsupported_reason.startswith("it has 10 packets for")


@pytest.mark.parametrize(
    ("random_access_points", "num_frames", "num_packets", "reason"),
    [
        ([0, 1500], 3000, 3000, ""),
        ([0, 1500], 3001, 3001, "it can't be entered within 1501 frames"),
        ([0], 10, 11, "it has 11 packets for 10 frames"),
        ([3], 10, 10, "its first frame does not stand alone"),
        ([], 10, 10, "its first frame does not stand alone"),
    ],
)
def test_random_access_points_decide(
    random_access_points: list[int], num_frames: int, num_packets: int, reason: str
) -> None:
    found = timeline_unsupported_reason(random_access_points, num_frames, num_packets)
    assert found.startswith(reason) and bool(found) == bool(reason)


# Frame headers: marker 10, two bits of profile, then whether an earlier frame is shown.
OWN, EARLIER = b"\x82\x00\x00", b"\x88"


@pytest.mark.parametrize(
    ("packet", "shows"),
    [
        (OWN, False),
        (EARLIER, True),
        (b"\xb0\x00", False),
        (b"\xb4\x00", True),
        # Superframes: a hidden frame, the shown one, and an index of their sizes.
        (OWN + OWN + b"\xc1\x03\x03\xc1", False),
        (OWN + EARLIER + b"\xc1\x03\x01\xc1", True),
        (OWN + EARLIER + b"\xc9\x03\x00\x01\x00\xc9", True),
    ],
)
def test_vp9_packets_that_show_earlier_frames_are_found(packet: bytes, shows: bool) -> None:
    assert shows_earlier_frame(packet) is shows


def vp9_header(*fields: tuple[int, int]) -> bytes:
    """Join (value, bits) into the first 24 bytes of a frame of profile 0."""
    bits = "1000" + "".join(f"{value:0{width}b}" for value, width in fields)
    return int(bits.ljust(24 * 8, "0"), 2).to_bytes(24, "big")


KEY = ((0, 1), (0, 1), (1, 1), (0, 1), (0x498342, 24), (2, 3), (0, 1))
PREDICTED = ((0, 1), (1, 1), (1, 1), (0, 1), (0, 2), (1, 8), (0, 12))
INTRA = ((0, 1), (1, 1), (0, 1), (0, 1), (1, 1), (0, 2), (0x498342, 24), (1, 8))
SIZE, OTHER = ((383, 16), (143, 16)), ((191, 16), (71, 16))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((*KEY, *SIZE, (0, 1)), True),
        ((*KEY, *OTHER, (0, 1)), False),
        ((*KEY, *SIZE, (1, 1), *SIZE), True),
        ((*KEY, *SIZE, (1, 1), *OTHER), False),
        ((*PREDICTED, (0, 1), (1, 1)), True),
        ((*PREDICTED, (0, 3), *SIZE, (0, 1)), True),
        ((*PREDICTED, (0, 3), *OTHER, (0, 1)), False),
        ((*INTRA, *SIZE, (0, 1)), True),
        ((*INTRA, *OTHER, (0, 1)), False),
    ],
)
def test_vp9_frames_of_another_size_are_found(
    fields: tuple[tuple[int, int], ...], expected: bool
) -> None:
    frame, repeated = vp9_header(*fields), vp9_header(*PREDICTED, (1, 1))
    assert has_size(frame, 384, 144) is expected
    both = frame + repeated + b"\xc1\x18\x18\xc1"
    assert has_size(both, 384, 144) is expected
    assert not has_size(frame[:2], 384, 144)


@pytest.mark.parametrize("extradata", [b"", b"\1" + bytes(3) + b"\xff" + bytes(16) + b"\xff"])
@pytest.mark.parametrize(
    ("codec", "nal_units", "expected"),
    [
        ("h264", [b"\x67abc", b"\x06de", b"\x65" + b"f" * 300], True),
        ("h264", [b"\x67abc", b"\x06de", b"\x41" + b"f" * 300], False),
        ("hevc", [b"\x40\x01a", b"\x26\x01" + b"b" * 300], True),
        ("hevc", [b"\x4e\x01a", b"\x2a\x01" + b"b" * 300], True),
        ("hevc", [b"\x40\x01a", b"\x02\x01" + b"b" * 300], False),
        ("hevc", [b"\x40\x01a"], False),
        ("vp9", [b"x"], True),
    ],
)
def test_random_access_points_are_known_by_their_first_slice(
    codec: str, nal_units: list[bytes], expected: bool, extradata: bytes
) -> None:
    packet = b""
    for nal_unit in nal_units:
        packet += (len(nal_unit).to_bytes(4, "big") if extradata else b"\0\0\1") + nal_unit
    assert is_random_access_point(codec, packet, extradata) is expected


def test_colors_converted_by_the_wrong_rule_are_corrected() -> None:
    generator = np.random.default_rng(0)
    blocks = generator.integers(60, 200, (9, 16, 3), dtype=np.uint8)
    pixels = np.kron(blocks, np.ones((16, 16, 1), dtype=np.uint8))
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=BT709)
    right = frame.reformat(format="rgb24").to_ndarray()
    frame.colorspace = 5
    wrong = torch.from_numpy(frame.reformat(format="rgb24").to_ndarray())
    assert np.abs(wrong.numpy().astype(int) - right).max() > 15, "the rules do not differ"
    corrected = to_space_of(wrong, BT709).numpy()
    assert np.abs(corrected.astype(int) - right).max() <= 3
    assert torch.equal(to_space_of(wrong, 5), wrong)


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "is_installed", "expected"),
    [
        ("auto", True, True, "dali"),
        ("auto", True, False, "pyav"),
        ("auto", False, True, "pyav"),
        ("pyav", True, True, "pyav"),
        ("dali", True, True, "dali"),
        ("dali", True, False, "where DALI is not installed"),
        ("dali", False, True, "without a GPU"),
    ],
)
def test_the_backend_is_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, has_gpu: bool, is_installed: bool, expected: str
) -> None:
    found = "a distribution" if is_installed else None
    monkeypatch.setattr("megatron_keye.config.backends._find", lambda name: found)
    try:
        assert decode_backend(wanted, has_gpu=has_gpu) == expected
    except ValueError as error:
        assert expected in str(error) and "data.decode.backend" in str(error)
