# SPDX-License-Identifier: Apache-2.0
"""What a probe refuses, what it leaves out, and where it lets decoding begin."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from megatron_keye.data.video import packet_source
from megatron_keye.data.video.packet_source import PacketSource, opened_packets
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import decode_frames
from megatron_keye.data.video.video_info import VideoInfo
from tests.support.clips import make_clip, numbered_frame, read_number
from tests.support.corpus import KINDS


def numbers(path: Path, indices: Sequence[int]) -> list[int]:
    return [read_number(frame) for frame in decode_frames(path, indices)]


def copy(source: Path, path: Path, change: Callable[[int, Any], bool]) -> Path:
    """Copy the packets that `change` keeps; it may also change them."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for place, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if change(place, packet):
                packet.stream = stream
                new.mux(packet)
    return path


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("ts", "h264"), ("ts", "mpeg2"), ("flv", "h264"), ("mpg", "mpeg1"), ("flv", "flv1")],
)
def test_joined_recordings_are_refused(tmp_path: Path, suffix: str, kind: str) -> None:
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path, num_frames in ((first, 40), (second, 30)):
        KINDS[kind].write(path, num_frames)
    # What stands in front of the second one belongs to it.
    path = tmp_path / f"clip.{suffix}"
    skipped = 13 if suffix == "flv" else 0
    path.write_bytes(first.read_bytes() + second.read_bytes()[skipped:])
    with pytest.raises(ValueError, match=r"clip\.\w+: its times start again at .* ffmpeg -f conc"):
        probe(path)


@pytest.mark.parametrize("num_later", [4, 40])
def test_times_that_start_again_are_refused_however_short(tmp_path: Path, num_later: int) -> None:
    """Also where no time occurs twice."""
    first, second = (
        make_clip(
            tmp_path / f"{offset}.flv",
            milliseconds=range(offset, 40 * num_frames, 40),
            options={"bf": "0", "g": "10"},
        )
        for offset, num_frames in ((0, 30), (7, num_later))
    )
    path = tmp_path / "clip.flv"
    path.write_bytes(first.read_bytes() + second.read_bytes()[13:])
    with pytest.raises(ValueError, match=r"clip\.flv: its times start again"):
        probe(path)


def test_frames_of_equal_time_are_refused(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", 20, options={"bf": "0"})

    def double(place: int, packet: Any) -> bool:
        packet.pts -= 40 * (place == 11)
        packet.dts = packet.pts
        return True

    path = copy(clip, tmp_path / "double.mkv", double)
    with pytest.raises(ValueError, match=r"double\.mkv: 1 frames have the time of another"):
        probe(path)


@pytest.mark.parametrize("suffix", ["mkv", "ts", "nut", "mp4"])
@pytest.mark.parametrize("kind", ["h264 open", "h264 pyramid", "hevc", "mpeg2", "mpeg4"])
def test_a_clip_cut_at_an_open_group_begins_with_its_keyframe(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    """Frames shown before the keyframe, but stored after it, refer to what was cut off."""
    # A transport stream has its parameters at each keyframe, else they are in front.
    whole = tmp_path / f"whole.{'ts' if suffix == 'ts' else 'mkv'}"
    assert KINDS[kind].write(whole, 60)
    info = probe(whole)
    entry = info.entries.packets[2]
    key = int(info.packet_frames[entry])
    assert info.packet_frames[entry:].min() < key, "the clip has no leading frames"
    start = info.timestamps[key]

    def shift(place: int, packet: Any) -> bool:
        if place < entry:
            return False
        packet.pts -= start
        packet.dts = None if packet.dts is None else packet.dts - start
        return True

    path = copy(whole, tmp_path / f"cut.{suffix}", shift)
    cut = probe(path)
    assert cut.num_frames == 60 - key and 0 <= cut.times[0] < 0.3
    np.testing.assert_allclose(np.diff(cut.times), 0.04, atol=2e-3)
    everything = list(range(cut.num_frames))
    assert numbers(path, everything) == list(range(key, 60))
    assert numbers(path, [cut.num_frames - 1, 5]) == [59, key + 5]


def test_a_stream_without_an_entry_point_is_refused(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", 20, options={"bf": "0", "g": "250"})
    path = copy(clip, tmp_path / "cut.mkv", lambda place, _: place >= 5)
    with pytest.raises(ValueError, match=r"cut\.mkv: has no frame at which decoding can begin"):
        probe(path)


@pytest.mark.parametrize("kind", ["h264", "hevc", "mpeg4", "mpeg2", "vp8", "vp9", "wmv1", "snow"])
def test_flags_that_call_every_packet_a_keyframe_change_nothing(tmp_path: Path, kind: str) -> None:
    clip, path = tmp_path / "clip.nut", tmp_path / "flagged.nut"
    assert KINDS[kind].write(clip, 40)

    def flag(_: int, packet: Any) -> bool:
        packet.is_keyframe = True
        return True

    copy(clip, path, flag)
    with av.open(str(path)) as container:
        assert sum(p.is_keyframe for p in container.demux(video=0)) == 40, "flags were not copied"
    expected = decode_frames(clip, range(40))
    for frame in (39, 25, 13):
        np.testing.assert_array_equal(decode_frames(path, [frame])[0], expected[frame])


@pytest.mark.parametrize("target", ["behind", "at the end", "in front"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
def test_frames_are_right_wherever_a_seek_lands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, target: str
) -> None:
    path = tmp_path / f"clip.{suffix}"
    assert KINDS["h264 open"].write(path, 60)
    entries = probe(path).entries
    places = {"behind": 4, "at the end": len(entries.packets) - 1, "in front": 1}
    after_seek = PacketSource._after_seek

    def elsewhere(self: PacketSource, _: int, *, is_position: bool = False) -> Any:
        of_entry = entries.positions if is_position else entries.timestamps
        return after_seek(self, int(of_entry[places[target]]), is_position=is_position)

    monkeypatch.setattr(PacketSource, "_after_seek", elsewhere)
    assert numbers(path, [27, 30]) == [27, 30]


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_a_packet_that_is_lost_after_a_seek_is_read_from_the_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """While its decoder, which holds frames already, goes on."""
    path = tmp_path / f"clip.{suffix}"
    assert KINDS["h264"].write(path, 60)
    with_content, num_calls = packet_source._with_content, 0

    def losing(*opened: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        packets = list(with_content(*opened))
        return iter(packets[:5] + packets[6:] if num_calls == 1 else packets)

    monkeypatch.setattr(packet_source, "_with_content", losing)
    assert numbers(path, [25, 30, 33]) == [25, 30, 33]
    assert num_calls == 2, "it was decoded a second time"


def test_a_seek_among_equal_packets_is_not_taken_for_another(tmp_path: Path) -> None:
    """A still picture's keyframes are equal; only their places tell them apart."""
    path = tmp_path / "clip.mpg"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg1video", rate=25, options={"g": "3"})
        stream.width, stream.height, stream.pix_fmt = 128, 48, "yuv420p"
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number // 50), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert numbers(path, [48, 51, 58]) == [0, 1, 1]
    assert numbers(path, [49]) == [0]


def test_what_no_longer_is_what_was_probed_is_refused(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", 20)
    info = probe(path)
    make_clip(path, 5)
    with opened_packets(info) as source, pytest.raises(ValueError, match="is no longer what it"):
        list(source.read(0))


def test_parameters_that_change_inside_close_entry_points_without_them(tmp_path: Path) -> None:
    """A decoder that began there would have the parameters in front."""
    first, second = (
        make_clip(
            tmp_path / f"{name}.ts", 36, options={"g": "12", "x264-params": f"ref={references}"}
        )
        for name, references in (("a", 1), ("b", 3))
    )
    with av.open(str(second)) as container:
        extradata = bytes(container.streams.video[0].codec_context.extradata)
    path = tmp_path / "clip.mkv"
    with av.open(str(first)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for place, packet in enumerate(p for p in old.demux(video=0) if p.size):
            added = extradata if place == 14 else b""
            changed = av.Packet(added + bytes(packet))
            changed.pts, changed.dts = packet.pts, packet.dts
            changed.time_base, changed.is_keyframe = packet.time_base, packet.is_keyframe
            changed.stream = stream
            new.mux(changed)
    assert probe(first).entries.first_frames.tolist() == [0, 12, 24]
    assert probe(path).entries.first_frames.tolist() == [0, 12]


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ([(1, False), (3, False), (2, False)], 1),
        ([(1, False), (3, False), (2, True)], 2),
        ([(2, False), (2, False)], 0),
        ([(2, True), (3, True)], 1),
    ],
)
def test_the_stream_that_players_show_is_taken(
    tmp_path: Path, streams: list[tuple[int, bool]], expected: int
) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        made = [container.add_stream("libx264", rate=25) for _ in streams]
        for stream, (scale, is_default) in zip(made, streams, strict=True):
            stream.width, stream.height, stream.pix_fmt = scale * 128, scale * 48, "yuv420p"
            stream.disposition = Disposition.default if is_default else Disposition(0)
        for place, stream in enumerate(made):
            pixels = np.kron(
                numbered_frame(place + 1), np.ones((streams[place][0],) * 2 + (1,), np.uint8)
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
    info = probe(path)
    scale = streams[expected][0]
    assert info.width == scale * 128
    (frame,) = decode_frames(path, [0])
    assert read_number(frame[::scale, ::scale]) == expected + 1


def test_packets_of_other_streams_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=48_000)
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 48, "yuv420p"
        for number in range(50):
            silence = np.zeros((1, 1920), dtype=np.int16)
            audio = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            audio.sample_rate, audio.pts = 48_000, 1920 * number
            container.mux(sound.encode(audio))
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    assert probe(path).num_frames == 50
    assert numbers(path, [49, 0, 25]) == [49, 0, 25]


@pytest.mark.parametrize("kind", ["h264 pyramid", "hevc", "vp8", "mpeg1"])
def test_what_was_probed_survives_being_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("clip.mpg" if kind == "mpeg1" else "clip.mkv")
    assert KINDS[kind].write(path, 40)
    info = probe(path)
    again = VideoInfo.from_bytes(path, info.to_bytes())
    for one, other in ((info, again), (info.entries, again.entries)):
        for name, value in vars(one).items():
            if name != "entries":
                np.testing.assert_array_equal(getattr(other, name), value)
    np.testing.assert_array_equal(again.times, info.times)
    with pytest.raises(ValueError, match=r"what was kept of its frames is damaged"):
        VideoInfo.from_bytes(path, info.to_bytes()[:-9])


def test_the_tables_of_containers_name_real_ones() -> None:
    assert all(av.ContainerFormat(name, "r").name for name in packet_source._SEEK_BY_BYTE)
