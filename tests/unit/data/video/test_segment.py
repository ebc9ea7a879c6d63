# SPDX-License-Identifier: Apache-2.0
"""Segments of a file: each is decoded alone and holds its frames, whatever the codec's order."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_keye.data.bitstream.description import describe
from megatron_keye.data.video.frame_runs import MIN_SKIPPED, FrameRuns, plan_frame_runs
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import iterate_frames
from megatron_keye.data.video.segment import Segment, opened_cutter
from tests.support.clips import BIG_BUCK_BUNNY, make_clip, read_number, real_clip

X264 = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:scenecut=0"}
OPEN = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:scenecut=0:open-gop=1"}
X265 = {"g": "12", "x265-params": "log-level=none:bframes=3"}
CLOSED = {"g": "12", "x265-params": "log-level=none:bframes=3:open-gop=0"}
VP9 = {"g": "12", "deadline": "realtime", "cpu-used": "8"}
EVERY_TWELVE = [0, 12, 24, 36, 48]


def plan(
    path: Path, wanted: list[int], max_wanted: int = 8, max_decoded: int = 1000
) -> list[FrameRuns]:
    info = probe(path)
    return plan_frame_runs(
        info.random_access_points,
        info.num_frames,
        wanted,
        max_wanted=max_wanted,
        max_decoded=max_decoded,
    )


def cut(path: Path, planned: list[FrameRuns]) -> list[Segment]:
    with opened_cutter(probe(path)) as cutter:
        return [cutter.cut(frame_runs) for frame_runs in planned]


def numbers_of(segment: Segment) -> list[int]:
    """Decode a whole segment, in its order of presentation."""
    with av.open(io.BytesIO(segment.container)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [read_number(frame) for frame in frames]


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "random_access_points"),
    [
        ("mp4", "libx264", X264, EVERY_TWELVE),
        ("mkv", "libx264", X264, EVERY_TWELVE),
        ("ts", "libx264", X264, EVERY_TWELVE),
        ("flv", "libx264", X264, EVERY_TWELVE),
        # Keyframes that decoding passes through, but can't start at.
        ("mp4", "libx264", OPEN, [0]),
        ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20"}, [0]),
        # HEVC's are followed by frames that are shown before them.
        ("mp4", "libx265", X265, EVERY_TWELVE),
        ("mkv", "libx265", X265, EVERY_TWELVE),
        ("ts", "libx265", X265, EVERY_TWELVE),
        ("mp4", "libx265", CLOSED, EVERY_TWELVE),
        ("webm", "libvpx-vp9", VP9, EVERY_TWELVE),
        ("mp4", "libvpx-vp9", VP9, EVERY_TWELVE),
    ],
)
def test_segments_hold_the_wanted_frames(
    tmp_path: Path,
    suffix: str,
    codec: str,
    options: dict[str, str],
    random_access_points: list[int],
) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", codec=codec, options=options)
    assert probe(path).random_access_points.tolist() == random_access_points
    for max_wanted, max_decoded in ((8, 12), (60, 30), (60, 1000)):
        for wanted in (list(range(60)), [59], [11, 12, 13], [0, 30, 31, 58], [0, 24, 25, 48]):
            found = []
            planned = plan(path, wanted, max_wanted=max_wanted, max_decoded=max_decoded)
            for segment in cut(path, planned):
                numbers = numbers_of(segment)
                assert numbers[0] in random_access_points, (
                    "a segment does not begin at a random access point"
                )
                assert len(segment.indices) <= max_wanted
                found += [numbers[place] for place in segment.places]
            assert found == wanted


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [("mp4", "libx264", X264), ("ts", "libx265", X265), ("webm", "libvpx-vp9", VP9)],
)
def test_a_segment_runs_over_random_access_points_and_leaves_out_what_lies_between(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", codec=codec, options=options)
    (frame_runs,) = plan(path, [1, 10, 13, 49])
    assert frame_runs.runs == (range(14), range(48, 50))
    (segment,) = cut(path, [frame_runs])
    numbers = numbers_of(segment)
    assert [numbers[place] for place in segment.places] == [1, 10, 13, 49]
    assert not set(numbers) & set(range(20, 48)), "frames were decoded that nothing needs"


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", X264),
        ("ts", "libx264", X264),
        ("mp4", "libx265", X265),
        ("mkv", "libx265", {"g": "24", "x265-params": X265["x265-params"] + ":temporal-layers=3"}),
    ],
)
def test_frames_that_no_other_needs_are_left_out(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", codec=codec, options=options)
    expected = dict(iterate_frames(path, range(60)))
    for wanted in (list(range(0, 60, 5)), list(range(1, 60, 7)), [23, 59]):
        (segment,) = cut(path, plan(path, wanted, max_wanted=60))
        with av.open(io.BytesIO(segment.container)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        if wanted != [23, 59]:
            assert len(frames) < 50, "frames are decoded that nothing needs"
        for index, place in zip(wanted, segment.places, strict=True):
            np.testing.assert_array_equal(frames[place], expected[index], strict=True)


def points(*frames: int) -> NDArray[np.int64]:
    return np.array(frames, dtype=np.int64)


def test_no_segment_is_larger_than_its_limits() -> None:
    planned = plan_frame_runs(
        points(*range(0, 3000, 30)), 3000, range(0, 3000, 7), max_wanted=25, max_decoded=120
    )
    indices = [index for frame_runs in planned for index in frame_runs.indices]
    assert indices == list(range(0, 3000, 7))
    for frame_runs in planned:
        assert len(frame_runs.indices) <= 25 and sum(map(len, frame_runs.runs)) <= 120
        assert all(run.start % 30 == 0 for run in frame_runs.runs)
    assert len(planned) == 25, "segments are smaller than they may be"


def test_a_long_section_is_cut_by_frames_wanted_and_decoded_from_its_access_point() -> None:
    planned = plan_frame_runs(points(0, 250), 500, range(20), max_wanted=8, max_decoded=5)
    runs = [frame_runs.runs for frame_runs in planned]
    assert runs == [(range(8),), (range(16),), (range(20),)]


def test_random_access_points_never_follow_each_other_where_frames_are_left_out() -> None:
    """Two H.264 random access points in a row may look like one frame."""
    (planned,) = plan_frame_runs(points(0, 30, 60), 90, [0, 60], max_wanted=8, max_decoded=99)
    assert planned.runs == (range(2), range(60, 62))
    everywhere = points(*range(90))
    apart = plan_frame_runs(everywhere, 90, [0, 60], max_wanted=8, max_decoded=99)
    assert [frame_runs.runs for frame_runs in apart] == [(range(1),), (range(60, 61),)]


def test_short_gaps_are_decoded_through() -> None:
    for gap, num_runs in ((MIN_SKIPPED - 1, 1), (MIN_SKIPPED, 2)):
        (planned,) = plan_frame_runs(
            points(0, 2 + gap), 90, [1, 3 + gap], max_wanted=8, max_decoded=99
        )
        assert len(planned.runs) == num_runs


def test_a_segment_is_no_longer_than_it_needs_to_be(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", options=X264)
    (segment,) = cut(path, plan(path, [26, 29]))
    assert len(numbers_of(segment)) <= 29 - 24 + 1, "it holds more than the references"


def test_a_segment_has_one_keyframe_and_times_of_its_own(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", codec="libx265", options=X265)
    (segment,) = cut(path, plan(path, [20, 22, 50]))
    with av.open(io.BytesIO(segment.container)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [packet.is_keyframe for packet in packets] == [True] + [False] * (len(packets) - 1)
    times = [packet.pts for packet in packets]
    assert len(set(times)) == len(times) and all(time is not None and time >= 0 for time in times)
    assert not any(packet.is_discard for packet in packets)


def test_a_real_clip_comes_out_bit_for_bit() -> None:
    path = real_clip(BIG_BUCK_BUNNY)
    (segment,) = cut(path, plan(path, [9, 20]))
    pixels = []
    for source, places in ((str(path), [9, 20]), (segment.container, segment.places)):
        opened = source if isinstance(source, str) else io.BytesIO(source)
        with av.open(opened) as container:
            frames = [f for f, _ in zip(container.decode(video=0), range(21), strict=False)]
        pixels.append([frames[place].to_ndarray().tobytes() for place in places])
    assert pixels[0] == pixels[1]


def planes_of(frame: av.VideoFrame) -> list[NDArray[np.uint8]]:
    """Return luma and both colour differences as they were decoded."""
    return [
        np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)[
            : plane.height, : plane.width
        ]
        for plane in frame.planes
    ]


BLOCKS = {"x265-params": "log-level=none:bframes=3:min-cu-size=16:ctu=32", "g": "12"}


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", X264),
        ("mkv", "libx264", X264),
        ("flv", "libx264", X264),
        ("mp4", "libx264", {"profile": "baseline", "g": "12"}),
        ("mp4", "libx264", {"g": "12", "bf": "0"}),
        (
            "mp4",
            "libx264",
            {"g": "12", "x264-params": "cqm=jvt:nal-hrd=vbr:vbv-maxrate=900:vbv-bufsize=900"},
        ),
        ("mp4", "libx265", BLOCKS),
        ("mkv", "libx265", BLOCKS),
        ("mp4", "libx265", {"x265-params": BLOCKS["x265-params"] + ":temporal-layers=3"}),
        # Frames that repeat it, behind lengths and behind start codes.
        ("mp4", "libx264", {"g": "12", "x264-params": "repeat-headers=1:annexb=0"}),
        ("mp4", "libx265", {"x265-params": BLOCKS["x265-params"] + ":repeat-headers=1"}),
        ("ts", "libx264", X264),
        ("ts", "libx265", BLOCKS),
    ],
)
@pytest.mark.parametrize(("cut_rows", "cut_columns"), [(8, 0), (2, 0), (6, 10), (0, 14)])
def test_segments_declare_no_cropping(
    tmp_path: Path,
    suffix: str,
    codec: str,
    options: dict[str, str],
    cut_rows: int,
    cut_columns: int,
) -> None:
    path = make_clip(
        tmp_path / f"clip.{suffix}",
        scale=3,
        cut_rows=cut_rows,
        cut_columns=cut_columns,
        codec=codec,
        options=options,
    )
    info = probe(path)
    (segment,) = cut(path, plan(path, [3, 50]))
    height, width = 144 - cut_rows, 384 - cut_columns
    assert (info.height, info.width) == (height, width)
    assert (segment.height, segment.width) == (144, 384)
    # What a reader learns without decoding: the sample entry, 28 bytes in.
    entry = segment.container.rindex(b"avc1" if codec == "libx264" else b"hev1")
    sides = np.frombuffer(segment.container, dtype=">u2", count=2, offset=entry + 28)
    assert sides.tolist() == [384, 144]
    pixels = []
    for source, places in ((str(path), (3, 50)), (io.BytesIO(segment.container), segment.places)):
        with av.open(source) as container:
            stored = container.streams.video[0].codec_context
            size = stored.height, stored.width
            frames = list(container.decode(video=0))
        pixels.append([plane for place in places for plane in planes_of(frames[place])])
    assert size == (144, 384), "the container still crops"
    for shown, stored_plane in zip(*pixels, strict=True):
        np.testing.assert_array_equal(stored_plane[: len(shown), : len(shown[0])], shown)


@pytest.mark.parametrize(("codec", "options"), [("libx264", X264), ("libx265", X265)])
def test_parameters_without_cropping_stay_as_they_are(
    tmp_path: Path, codec: str, options: dict[str, str]
) -> None:
    path = make_clip(tmp_path / "clip.mp4", codec=codec, options=options)
    (segment,) = cut(path, plan(path, [3]))
    with av.open(str(path)) as whole, av.open(io.BytesIO(segment.container)) as part:
        assert describe(part.streams.video[0]).sps == describe(whole.streams.video[0]).sps


def test_frames_that_repeat_their_parameters_are_cut(tmp_path: Path) -> None:
    options = X264 | {"x264-params": X264["x264-params"] + ":repeat-headers=1:annexb=0"}
    path = make_clip(tmp_path / "clip.mp4", options=options)
    (segment,) = cut(path, plan(path, [3, 50]))
    numbers = numbers_of(segment)
    assert [numbers[place] for place in segment.places] == [3, 50]


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", options=X264)
    planned, info = plan(path, [50]), probe(path)
    make_clip(path, 20, options=X264)
    with (
        opened_cutter(info) as cutter,
        pytest.raises(ValueError, match=r"clip\.mp4: packet 17 is no longer what it was"),
    ):
        cutter.cut(planned[0])


def test_a_closed_file_is_cut_no_more(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", options=X264)
    with opened_cutter(probe(path)) as cutter:
        pass
    with pytest.raises(ValueError, match=r"clip\.mp4: was closed"):
        cutter.cut(plan(path, [50])[0])
