# SPDX-License-Identifier: Apache-2.0
"""Decoding: frame numbers in the pixels prove that indices and times are exact."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from PIL import Image

from megatron_keye.data.video import pyav
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import decode_frames
from megatron_keye.data.video.video_info import VideoInfo
from tests.support.clips import (
    BIG_BUCK_BUNNY,
    BIKES,
    CARPHONES,
    HEIGHT,
    WIDTH,
    make_audio,
    make_clip,
    numbered_frame,
    read_number,
    real_clip,
)

VARIABLE = [0, 40, 80, 500, 510, 520, 1000, 1700, 1740, 2000, 4000, 4033]
B_FRAMES = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:open-gop=1:scenecut=0"}


def numbers(path: Path, indices: list[int]) -> list[int]:
    return [read_number(frame) for frame in decode_frames(path, indices)]


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", B_FRAMES),
        ("mkv", "libx264", B_FRAMES),
        ("ts", "libx264", B_FRAMES),
        ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20"}),
        ("mp4", "libx265", {"g": "12", "x265-params": "log-level=none:bframes=3"}),
        ("webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
        ("webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10"}),
        ("avi", "mpeg4", {"g": "12"}),
        ("flv", "libx264", B_FRAMES),
    ],
)
def test_frames_come_by_index_in_any_order(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", codec=codec, options=options)
    assert probe(path).num_frames == 60, "the container's frames were miscounted"
    assert numbers(path, list(range(60))) == list(range(60))
    for indices in ([59], [47, 3, 3, 58], [13, 12, 11], [36], [37, 59]):
        assert numbers(path, indices) == indices


def test_b_frames_are_in_the_test_clip(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", options=B_FRAMES)
    with av.open(str(path)) as container:
        kinds = {PictureType(frame.pict_type) for frame in container.decode(video=0)}
    assert PictureType.B in kinds, "the clip does not test reordering"


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mkv", "libx264", B_FRAMES),
        ("mp4", "libx264", B_FRAMES),
        ("mp4", "libx265", {"g": "4", "x265-params": "log-level=none:bframes=3"}),
        ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_times_are_the_true_ones_of_a_variable_rate(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = make_clip(
        tmp_path / f"clip.{suffix}", codec=codec, milliseconds=VARIABLE, options=options
    )
    info = probe(path)
    np.testing.assert_allclose(info.times * 1000, VARIABLE, atol=1e-9)
    assert numbers(path, [11, 3, 6]) == [11, 3, 6]


def test_times_start_near_zero_in_a_transport_stream(tmp_path: Path) -> None:
    info = probe(make_clip(tmp_path / "clip.ts"))
    np.testing.assert_allclose(info.times, np.arange(60) * 0.04, atol=1e-4)


@pytest.mark.parametrize("name", [BIG_BUCK_BUNNY, BIKES, *CARPHONES])
def test_real_clips_have_the_times_that_decoding_gives(name: str) -> None:
    info = probe(real_clip(name))
    with av.open(str(info.path)) as container:
        decoded = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(info.times, decoded, atol=1e-12)


def test_real_clip_decodes_bitwise_the_same_after_a_seek() -> None:
    path = real_clip(BIKES)
    assert len(probe(path).entries.packets) > 1, "the clip does not test seeking"
    indices = [249, 120, 61]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(decode_frames(path, indices), [frames[i] for i in indices])


def test_decoding_starts_at_the_entry_point_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip(tmp_path / "clip.mp4", options=B_FRAMES)
    starts, decoded = [], pyav._decoded

    def recorded(info: VideoInfo, entry: int, num_threads: int) -> Any:
        starts.append(int(info.entries.first_frames[entry]))
        return decoded(info, entry, num_threads)

    monkeypatch.setattr(pyav, "_decoded", recorded)
    assert numbers(path, [30, 40]) == [30, 40]
    assert starts == [24], "a second pass was needed"


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_orientation_is_obeyed(tmp_path: Path, rotation: int, is_mirrored: bool) -> None:
    path = make_clip(tmp_path / "clip.mp4", 2, rotation=rotation, is_mirrored=is_mirrored)
    info = probe(path)
    shape = (WIDTH, HEIGHT) if rotation % 180 else (HEIGHT, WIDTH)
    assert (info.height, info.width) == shape
    # FFmpeg's matrix turns first and flips what has been turned.
    expected = np.rot90(numbered_frame(1), rotation // 90)
    expected = expected[:, ::-1] if is_mirrored else expected
    difference = np.abs(decode_frames(path, [1])[0].astype(int) - expected)
    assert difference.mean() < 12, "the frame is not the way up that the container asks for"


def test_hidden_reference_frames_are_not_counted(tmp_path: Path) -> None:
    plain = make_clip(tmp_path / "plain.webm", 10, codec="libvpx")
    path = tmp_path / "clip.webm"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size == 0:
                continue
            time, content = packet.pts, bytearray(bytes(packet))
            packet.stream = stream
            target.mux(packet)
            # The show bit of a VP8 frame, cleared.
            content[0] &= ~0x10
            hidden = av.Packet(bytes(content))
            hidden.pts = hidden.dts = time + 10
            hidden.time_base, hidden.stream = av.AVRational(1, 1000), stream
            target.mux(hidden)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 20
    assert probe(path).num_frames == len(decode_frames(path, range(10))) == 10


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_that_hides_its_order_is_refused(tmp_path: Path, codec: str) -> None:
    path = make_clip(tmp_path / "clip.avi", codec=codec, options={"bf": "2", "g": "12"})
    with pytest.raises(ValueError, match=r"clip\.avi: is an AVI whose frames"):
        probe(path)


def test_oblique_rotation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="oblique"):
        probe(make_clip(tmp_path / "clip.mp4", 2, rotation=45))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_ten_bit_video_decodes_to_eight(tmp_path: Path, codec: str) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = make_clip(
        tmp_path / "clip.mp4", 5, codec=codec, pixel_format="yuv420p10le", options=options
    )
    assert numbers(path, [4, 0]) == [4, 0]


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", 1)
    assert probe(path).times.tolist() == [0.0]
    assert numbers(path, [0, 0]) == [0, 0]


def test_no_indices_give_no_frames(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", 1)
    assert decode_frames(path, []).shape == (0, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("index", [-1, 5])
def test_indices_outside_are_refused(tmp_path: Path, index: int) -> None:
    path = make_clip(tmp_path / "clip.mp4", 5)
    with pytest.raises(ValueError, match=rf"clip.mp4: frame {index} .* expected 0 to 4"):
        decode_frames(path, [0, index])


def test_probe_is_asked_once_for_each_state_of_a_file(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", 5)
    assert probe(path) is probe(path)
    make_clip(path, 7)
    assert probe(path).num_frames == 7


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / "bad.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello world\n" * 100)
    elif kind == "picture":
        Image.new("RGB", (30, 20)).save(path, format="png")
    elif kind == "audio":
        make_audio(path)
    elif kind != "missing":
        muxing = {"movflags": "faststart"} if kind == "cut data" else {}
        make_clip(path, muxing=muxing)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "is not there"),
        ("empty", "0 bytes"),
        ("text", "cannot be read as a video"),
        ("picture", "still image"),
        ("audio", "audio but no video"),
        ("cut index", ""),
        ("cut data", "cut short"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, kind: str, words: str) -> None:
    path = bad_file(kind, tmp_path)
    with pytest.raises(ValueError, match=f"bad.mp4: .*{words}"):
        decode_frames(path, [0])


def test_a_frame_past_a_cut_is_refused(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.ts", options={"g": "12"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0 < probe(path).num_frames < 60, "the cut took no frame away"
    with pytest.raises(ValueError, match="clip.ts: frame 59 was asked for"):
        decode_frames(path, [0, 59])
