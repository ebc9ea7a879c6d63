"""Pieces of a file: each stands alone and holds its frames, whatever the codec's order."""

import io
from pathlib import Path

import av
import pytest

from megatron_keye.data import probe
from megatron_keye.data.segment import Segment, cut_segments
from tests.support.clips import BIG_BUCK_BUNNY, make_clip, read_number, real_clip

X264 = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:scenecut=0"}
OPEN = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:scenecut=0:open-gop=1"}
X265 = {"g": "12", "x265-params": "log-level=none:bframes=3"}
CLOSED = {"g": "12", "x265-params": "log-level=none:bframes=3:open-gop=0"}
VP9 = {"g": "12", "deadline": "realtime", "cpu-used": "8"}
EVERY_TWELVE = [0, 12, 24, 36, 48]


def numbers_of(segment: Segment) -> list[int]:
    """Decode a whole piece, in its order of presentation."""
    with av.open(io.BytesIO(segment.container)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [read_number(frame) for frame in frames]


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "entry_points"),
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
def test_pieces_hold_the_wanted_frames(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], entry_points: list[int]
) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", codec=codec, options=options)
    info = probe(path)
    assert info.entry_points.tolist() == entry_points
    for wanted in (list(range(60)), [59], [11, 12, 13], [0, 30, 31, 58]):
        found = []
        for segment in cut_segments(info, wanted, max_frames=8):
            numbers = numbers_of(segment)
            assert numbers[0] in entry_points, "a piece does not begin at an entry point"
            assert len(segment.indices) <= 8
            found += [numbers[place] for place in segment.places]
        assert found == wanted


def test_a_piece_is_no_longer_than_it_needs_to_be(tmp_path: Path) -> None:
    info = probe(make_clip(tmp_path / "clip.mp4", options=X264))
    (segment,) = cut_segments(info, [26, 29], max_frames=8)
    assert 29 - 24 < len(numbers_of(segment)) <= 29 - 24 + 4, "it holds more than the references"


def test_packets_of_a_piece_have_one_entry_and_times_of_their_own(tmp_path: Path) -> None:
    info = probe(make_clip(tmp_path / "clip.mp4", codec="libx265", options=X265))
    (segment,) = cut_segments(info, [20], max_frames=8)
    with av.open(io.BytesIO(segment.container)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [packet.is_keyframe for packet in packets] == [True] + [False] * (len(packets) - 1)
    times = [packet.pts for packet in packets]
    assert len(set(times)) == len(times) and all(time is not None and time >= 0 for time in times)
    assert not any(packet.is_discard for packet in packets)


def test_a_real_clip_comes_out_bit_for_bit(tmp_path: Path) -> None:
    info = probe(real_clip(BIG_BUCK_BUNNY))
    (segment,) = cut_segments(info, [9, 20], max_frames=8)
    pixels = []
    for source, places in ((str(info.path), [9, 20]), (segment.container, segment.places)):
        opened = source if isinstance(source, str) else io.BytesIO(source)
        with av.open(opened) as container:
            frames = [f for f, _ in zip(container.decode(video=0), range(21), strict=False)]
        pixels.append([frames[place].to_ndarray().tobytes() for place in places])
    assert pixels[0] == pixels[1]


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", options=X264)
    info = probe(path)
    make_clip(path, 20, options=X264)
    with pytest.raises(ValueError, match=r"clip\.mp4: frames 48 to 50 are no longer where"):
        list(cut_segments(info, [50], max_frames=8))
