# SPDX-License-Identifier: Apache-2.0
"""Damaged files, hundreds of them: a named error, or exactly what the file still holds.

Codecs carry no checksums, so what is damaged inside a frame may look sound to any decoder. Exact
therefore means: the times that the container states, and at each the very pixels that FFmpeg gives
when it decodes the whole file from the top, without seeking and without our indices. A file that
was only cut must besides hold its true frames.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_keye.data.video.frame_runs import plan_frame_runs
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import decode_frames, iterate_frames
from megatron_keye.data.video.segment import opened_cutter
from tests.support.child import Child
from tests.support.clips import HEIGHT, make_clip, read_number, shrink
from tests.support.damage import Case, check_outcomes, damaged_cases, outcome_of

NUM_FRAMES, FRAME_SECONDS = 12, 0.04
SCALE = 3
"""Makes frames of 384 x 144, which go to the GPU, so that segments are cut for it."""
CASES_A_KIND = 60
TIMEOUT_SECONDS = 10.0
X264 = {"bf": "2", "g": "6", "x264-params": "b-adapt=0:scenecut=0"}
X265 = {"g": "6", "x265-params": "log-level=none:bframes=2"}
VP9 = {"g": "6", "deadline": "realtime", "cpu-used": "8"}
KINDS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "h264.mp4": ("libx264", X264, {}),
    "front.mp4": ("libx264", X264, {"movflags": "faststart"}),
    "fragments.mp4": ("libx264", X264, {"movflags": "frag_keyframe+empty_moov"}),
    "h264.mkv": ("libx264", X264, {}),
    "h264.ts": ("libx264", X264, {}),
    "h264.flv": ("libx264", X264, {}),
    "hevc.mp4": ("libx265", X265, {}),
    "hevc.mkv": ("libx265", X265, {}),
    "hevc.ts": ("libx265", X265, {}),
    "vp9.webm": ("libvpx-vp9", VP9, {}),
    "vp8.webm": ("libvpx", {"g": "6", "deadline": "realtime"}, {}),
    "mpeg4.avi": ("mpeg4", {"g": "6"}, {}),
}
MOST_MEBIBYTES = 1024.0


def read(case: Case) -> str:
    """Probe and decode a file; "error" or "exact", or what is wrong with the outcome."""
    av.logging.set_level(None)
    return outcome_of(case, _compare, most_mebibytes=MOST_MEBIBYTES)


def _compare(case: Case) -> str:
    path = Path(case.path)
    info = probe(path)
    if not info.gpu_unsupported_reason:
        wanted = range(info.num_frames)
        planned = plan_frame_runs(
            info.random_access_points, info.num_frames, wanted, max_wanted=9, max_decoded=9
        )
        with opened_cutter(info) as cutter:
            for frame_runs in planned:
                cutter.cut(frame_runs)
    # Threads of FFmpeg make what they can of damage, not always the same; one thread does.
    frames = dict(iterate_frames(path, range(info.num_frames), num_threads=1))
    expected = _plainly_decoded(path, info.height, info.width)
    for index, frame in frames.items():
        others = expected.get(int(info.timestamps[index]), [])
        if not any(np.array_equal(frame, other) for other in others):
            return f"another frame {index} than FFmpeg's"
    if case.is_only_cut:
        shown = [round(time / FRAME_SECONDS) for time in info.times]
        scale = info.height // HEIGHT
        if [read_number(shrink(frame, scale)) for frame in frames.values()] != shown:
            return "frames that were never there"
    with_threads = decode_frames(path, [0, info.num_frames - 1])
    if with_threads.shape != (2, info.height, info.width, 3):
        return f"frames of shape {with_threads.shape}"
    return "exact"


def _plainly_decoded(path: Path, height: int, width: int) -> dict[int, list[NDArray[np.uint8]]]:
    """Return all frames that FFmpeg gives, by timestamp."""
    frames: dict[int, list[NDArray[np.uint8]]] = {}
    with av.open(str(path)) as container, suppress(av.FFmpegError):
        decoder = container.streams.video[0].codec_context
        decoder.thread_count = 1
        for packet in container.demux(video=0):
            # As FFmpeg's own command, go on behind a packet that can't be decoded.
            with suppress(av.FFmpegError):
                for frame in decoder.decode(packet):
                    if frame.pts is not None:
                        pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
                        frames.setdefault(frame.pts, []).append(pixels)
    return frames


def misbehave(case: str) -> str:
    if case == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == "hang":
        time.sleep(60)
    return case


def test_crashes_and_hangs_would_show() -> None:
    with Child(misbehave, timeout_seconds=2.0) as child:
        outcomes = [child(case) for case in ("fine", "crash", "hang", "fine")]
    assert outcomes == ["fine", f"crashed with exit code -{signal.SIGSEGV.value}", "hung", "fine"]


@pytest.fixture(scope="module")
def reader() -> Iterator[Child]:
    with Child(read, TIMEOUT_SECONDS) as child:
        yield child


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_exactly(
    tmp_path: Path, reader: Child, num_damaged: int, kind: str
) -> None:
    codec, options, muxing = KINDS[kind]
    path = make_clip(
        tmp_path / kind, NUM_FRAMES, scale=SCALE, codec=codec, options=options, muxing=muxing
    )
    content = path.read_bytes()
    is_cut_up = not probe(path).gpu_unsupported_reason
    assert is_cut_up == (kind.split(".")[0] not in ("vp8", "mpeg4")), "no segments are cut"
    assert reader(Case(str(path), content, True)) == "exact", "the undamaged file is not read"
    outcomes = {
        label: reader(damaged)
        for label, damaged in damaged_cases(path, max(CASES_A_KIND, num_damaged), len(kind))
    }
    print(f"{kind}: {check_outcomes(kind, outcomes)}")


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_an_avi_with_b_frames_is_refused_or_exact_wherever_it_is_cut(
    tmp_path: Path, reader: Child, codec: str
) -> None:
    options = X264 if codec == "libx264" else {"g": "6", "bf": "2"}
    path = make_clip(tmp_path / "clip.avi", NUM_FRAMES, codec=codec, options=options)
    content = path.read_bytes()
    cuts = np.linspace(0, len(content), 40).astype(int).tolist()
    outcomes = [reader(Case(str(path), content[:cut], True)) for cut in cuts]
    assert outcomes[-1] == "error", "the whole file was read"
    assert set(outcomes) <= {"error", "exact"}
