# SPDX-License-Identifier: Apache-2.0
"""Decoding on the GPU: the CPU's frames by the CPU's indices, or the CPU itself.

Tolerance: the colours of the two differ by rounding and by how chroma is spread over pixels, mean
below 2 of 255; numbers in the pixels prove that it is the right frame.
"""

import importlib.util
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_keye.config import DecodeConfig
from megatron_keye.data.media import Medium
from megatron_keye.data.row import Picture
from megatron_keye.data.video.chunk_patches import decode_chunks
from megatron_keye.data.video.decode_service import DecodeService
from megatron_keye.data.video.gpu_rules import HEVC_STEP, VP9_STEP
from megatron_keye.data.video.patches import make_patches
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import PyavDecoder, decode_frames
from tests.support.clips import (
    BIG_BUCK_BUNNY,
    BIKES,
    make_clip,
    read_number,
    real_clip,
    shrink,
    tiny_vision,
)
from tests.support.corpus import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_keye.data.video.dali import DaliDecoder

SCALE = 3
"""Makes clips of 384 x 144, which all decoders of a GPU take."""
MEAN_DIFFERENCE = 2.0
X264 = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:scenecut=0"}
X265 = {"g": "12", "x265-params": "log-level=none:bframes=3"}
# Stores multiples of 16, as encoders in hardware do.
BLOCKS = {"g": "12", "x265-params": "log-level=none:bframes=3:min-cu-size=16:ctu=32"}
VP9 = {"g": "12", "deadline": "realtime", "cpu-used": "8"}
VARIABLE = [0, 40, 80, 500, 510, 520, 1000, 1700, 1740, 2000, 4000, 4033]

CLIPS = {
    "h264": ("mp4", "libx264", X264),
    "h264 without B-frames": ("mp4", "libx264", {"bf": "0", "g": "12"}),
    "h264 in matroska": ("mkv", "libx264", X264),
    "h264 in a transport stream": ("ts", "libx264", X264),
    "h264 with one random access point": (
        "mp4",
        "libx264",
        {"bf": "3", "g": "12", "x264-params": "b-adapt=0:scenecut=0:open-gop=1"},
    ),
    "hevc with leading pictures": ("mp4", "libx265", X265),
    "hevc in matroska": ("mkv", "libx265", X265),
    "hevc in a transport stream": ("ts", "libx265", X265),
    "vp9": ("webm", "libvpx-vp9", VP9),
    "vp9 with hidden frames": (
        "webm",
        "libvpx-vp9",
        {"g": "24", "lag-in-frames": "16", "auto-alt-ref": "1"},
    ),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="no DALI"),
]


@pytest.fixture(scope="module")
def dali() -> "Iterator[DaliDecoder]":
    from megatron_keye.data.video.dali import DaliDecoder

    decoder = DaliDecoder(torch.device("cuda", 0), num_streams=3)
    yield decoder
    decoder.close()


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut segments of five frames, so that a short clip becomes many."""
    monkeypatch.setattr("megatron_keye.data.video.dali.SEGMENT_BYTES", 5 * 3 * 384 * 144)


def gpu_frames(dali: "DaliDecoder", path: Path, indices: list[int]) -> NDArray[np.uint8]:
    """Decode on the GPU: the CPU must not have stepped in."""
    assert probe(path).gpu_unsupported_reason == "", "the clip does not test the GPU"
    decoded = dict(dali.frames(path, indices))
    assert list(decoded) == sorted(set(indices)), "other frames came, or in another order"
    assert all(frame.is_cuda for frame in decoded.values())
    return np.stack([decoded[index].cpu().numpy() for index in indices])


def assert_close(got: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    assert got.shape == expected.shape
    difference = np.abs(got.astype(int) - expected)
    assert difference.mean() < MEAN_DIFFERENCE, (
        f"differs by {difference.mean():.2f} on average, {difference.max()} at most"
    )


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize(("suffix", "codec", "options"), CLIPS.values(), ids=CLIPS)
def test_frames_come_by_index(
    tmp_path: Path, dali: "DaliDecoder", suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", scale=SCALE, codec=codec, options=options)
    for indices in (list(range(60)), [59], [0], [11, 12, 13], [0, 25, 26, 58], [30, 31]):
        frames = gpu_frames(dali, path, indices)
        assert [read_number(shrink(frame, SCALE)) for frame in frames] == indices
        assert_close(frames, decode_frames(path, indices))


@pytest.mark.parametrize(("suffix", "codec", "options"), CLIPS.values(), ids=CLIPS)
def test_a_segment_runs_over_random_access_points(
    tmp_path: Path, dali: "DaliDecoder", suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", 120, scale=SCALE, codec=codec, options=options)
    # All frames; every twelfth, as training does; random access points far apart.
    for indices in (list(range(120)), list(range(0, 120, 12)), [0, 48, 49, 96], [13, 71, 119]):
        frames = gpu_frames(dali, path, indices)
        assert [read_number(shrink(frame, SCALE)) for frame in frames] == indices
        assert_close(frames, decode_frames(path, indices))


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "m2ts", "flv", "webm", "avi", "mpg"])
@pytest.mark.parametrize("name", KINDS)
def test_both_decoders_agree_on_every_container_and_codec(
    tmp_path: Path, dali: "DaliDecoder", name: str, suffix: str
) -> None:
    """What a GPU does not decode exactly comes from the CPU; both must keep one order."""
    path, kind = tmp_path / f"clip.{suffix}", KINDS[name]
    if suffix not in kind.accepted.split():
        pytest.skip(f"{suffix} does not take {name}")
    assert kind.write(path, 60, SCALE)
    for indices in (list(range(60)), *([s, s + 1, s + 7] for s in (0, 11, 23, 30, 37, 52))):
        decoded = dict(dali.frames(path, indices))
        assert list(decoded) == indices, "other frames came, or in another order"
        frames = np.stack([frame.cpu().numpy() for frame in decoded.values()])
        assert_close(frames, decode_frames(path, indices))
        numbers = [read_number(shrink(frame, SCALE)) for frame in frames]
        wrong = {i: number for i, number in zip(indices, numbers, strict=True) if i != number}
        # AV1's encoder blurs some numbers away.
        assert name == "av1" or not wrong, "other frames came"


@pytest.mark.usefixtures("small_segments")
def test_frames_are_right_while_the_gpu_is_busy(tmp_path: Path, dali: "DaliDecoder") -> None:
    """Copies that wait for their turn must find what they are to copy, of either decoder."""
    from megatron_keye.data.video.dali import DaliDecoder

    path = make_clip(tmp_path / "clip.mp4", scale=SCALE, options={"bf": "0", "g": "12"})
    factor = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def wrong_frames(decoder: DaliDecoder) -> dict[tuple[int, int], int]:
        wrong = {}
        for turn in range(30):
            for _ in range(40):
                torch.matmul(factor, factor)
            frames = gpu_frames(decoder, path, list(range(60)))
            numbers = [read_number(shrink(frame, SCALE)) for frame in frames]
            wrong |= {(turn, i): number for i, number in enumerate(numbers) if i != number}
        return wrong

    other = DaliDecoder(torch.device("cuda", 0), num_streams=3)
    with closing(other), ThreadPoolExecutor(2) as threads:
        wrong = list(threads.map(wrong_frames, (dali, other)))
    assert wrong == [{}, {}], "other frames came, by turn and index"


@pytest.mark.parametrize(("suffix", "rotation"), [("mp4", 0), ("mp4", 90), ("mkv", 0), ("ts", 0)])
@pytest.mark.parametrize(("codec", "options"), [("libx264", X264), ("libx265", BLOCKS)])
def test_rows_and_columns_beyond_the_shown_frame_are_cropped(
    tmp_path: Path,
    dali: "DaliDecoder",
    codec: str,
    options: dict[str, str],
    suffix: str,
    rotation: int,
) -> None:
    """Whole frames come first, since DALI reuses their decoder for the cropped ones."""
    for cut_rows, cut_columns in ((0, 0), (8, 0), (2, 6), (0, 0)):
        path = make_clip(
            tmp_path / f"{cut_rows}.{suffix}",
            30,
            scale=4,
            cut_rows=cut_rows,
            cut_columns=cut_columns,
            rotation=rotation,
            codec=codec,
            options=options,
        )
        assert_close(gpu_frames(dali, path, [0, 13, 29]), decode_frames(path, [0, 13, 29]))


@pytest.mark.parametrize(("codec", "options"), [("libx264", X264), ("libx265", BLOCKS)])
def test_1080_rows_that_are_stored_as_1088_are_right(
    tmp_path: Path, dali: "DaliDecoder", codec: str, options: dict[str, str]
) -> None:
    for cut_rows in (16, 24):
        path = make_clip(
            tmp_path / f"{cut_rows}.mp4",
            14,
            scale=23,
            cut_rows=cut_rows,
            cut_columns=1024,
            codec=codec,
            options=options,
        )
        assert probe(path).height == 1104 - cut_rows
        assert_close(gpu_frames(dali, path, [0, 13]), decode_frames(path, [0, 13]))


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "step"),
    [("mp4", "libx265", X265, HEVC_STEP), ("webm", "libvpx-vp9", VP9, VP9_STEP)],
)
def test_sides_that_are_multiples_of_the_step_are_right(
    tmp_path: Path,
    dali: "DaliDecoder",
    suffix: str,
    codec: str,
    options: dict[str, str],
    step: int,
) -> None:
    """Nothing is cropped here, but a GPU may round sizes up, and reuse a decoder of that size."""
    for cut_rows in (0, step, 2 * step, 3 * step, 0):
        path = make_clip(
            tmp_path / f"{cut_rows}.{suffix}",
            30,
            scale=4,
            cut_rows=cut_rows,
            codec=codec,
            options=options,
        )
        assert not probe(path).gpu_unsupported_reason, "the GPU decodes it"
        assert_close(gpu_frames(dali, path, [0, 13, 29]), decode_frames(path, [0, 13, 29]))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_variable_rate_changes_nothing(tmp_path: Path, dali: "DaliDecoder", codec: str) -> None:
    options = X264 if codec == "libx264" else X265
    path = make_clip(
        tmp_path / "clip.mkv", scale=SCALE, codec=codec, milliseconds=VARIABLE, options=options
    )
    frames = gpu_frames(dali, path, list(range(12)))
    assert [read_number(shrink(frame, SCALE)) for frame in frames] == list(range(12))


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_orientation_is_obeyed(
    tmp_path: Path, dali: "DaliDecoder", rotation: int, is_mirrored: bool
) -> None:
    path = make_clip(
        tmp_path / "clip.mp4", 3, scale=SCALE, rotation=rotation, is_mirrored=is_mirrored
    )
    assert_close(gpu_frames(dali, path, [0, 2]), decode_frames(path, [0, 2]))


@pytest.mark.parametrize("color_space", [1, 5])
def test_colors_follow_the_videos_own_rule(
    tmp_path: Path, dali: "DaliDecoder", color_space: int
) -> None:
    path = make_clip(tmp_path / "clip.mp4", 3, scale=SCALE, color_space=color_space)
    assert probe(path).color_space == color_space, "the clip does not test colours"
    assert_close(gpu_frames(dali, path, [0, 2]), decode_frames(path, [0, 2]))


def test_full_range_video_is_converted_as_such(tmp_path: Path, dali: "DaliDecoder") -> None:
    path = make_clip(tmp_path / "clip.mp4", 3, scale=SCALE, pixel_format="yuvj420p")
    assert_close(gpu_frames(dali, path, [0, 2]), decode_frames(path, [0, 2]))


@pytest.mark.parametrize("name", [BIG_BUCK_BUNNY, BIKES])
def test_real_clips_agree_with_the_cpu(dali: "DaliDecoder", name: str) -> None:
    path = real_clip(name)
    indices = [0, 7, 60, 61, 119, probe(path).num_frames - 1]
    assert_close(gpu_frames(dali, path, indices), decode_frames(path, indices))


def test_indices_outside_are_refused(tmp_path: Path, dali: "DaliDecoder") -> None:
    path = make_clip(tmp_path / "clip.mp4", 5, scale=SCALE)
    for index in (5, -1):
        with pytest.raises(ValueError, match=rf"clip.mp4: frame {index} .* expected 0 to 4"):
            list(dali.frames(path, [0, index]))


def test_dali_itself_refuses_an_index_past_the_end(tmp_path: Path, dali: "DaliDecoder") -> None:
    """If our own check failed, there would be an error rather than a black frame."""
    from megatron_keye.data.video.frame_runs import FrameRuns
    from megatron_keye.data.video.segment import Segment, opened_cutter

    info = probe(make_clip(tmp_path / "clip.mp4", 5, scale=SCALE))
    frame_runs = FrameRuns(indices=(4,), runs=(range(5),))
    with opened_cutter(info) as cutter:
        cut: Future[Segment] = Future()
        cut.set_result(replace(cutter.cut(frame_runs), places=(99,)))
        with pytest.raises(ValueError, match=r"clip.mp4: DALI could not decode"):
            dali._decode(info, [cut])
    assert read_number(shrink(gpu_frames(dali, info.path, [4])[0], SCALE)) == 4


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ({"scale": 1}, "128 x 48 pixels"),
        ({"scale": SCALE, "pixel_format": "yuv420p10le"}, "yuv420p10le"),
        ({"scale": SCALE, "pixel_format": "yuv444p"}, "yuv444p"),
        ({"scale": SCALE, "codec": "mpeg4"}, "mpeg4"),
        ({"scale": SCALE, "options": {"x264-params": "crop-rect=8,0,0,0"}}, "at the left"),
    ],
)
def test_what_a_gpu_gets_wrong_goes_to_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: dict[str, Any], reason: str
) -> None:
    from megatron_keye.data.video.dali import DaliDecoder

    path = make_clip(tmp_path / "clip.mp4", 5, **make)
    decoder = DaliDecoder(torch.device("cuda", 0))
    decoded = dict(decoder.frames(path, [4, 1]))
    assert list(decoder.frames(path, [])) == []
    decoder.close()
    np.testing.assert_array_equal(
        torch.stack([decoded[1], decoded[4]]).cpu().numpy(), decode_frames(path, [1, 4])
    )
    assert all(frame.is_cuda for frame in decoded.values())
    assert [reason in record.message for record in caplog.records] == [True], "logged once"


def test_several_files_decode_side_by_side(tmp_path: Path, dali: "DaliDecoder") -> None:
    clips = [
        make_clip(tmp_path / f"{place}.mp4", 40, scale=SCALE, codec=codec, options=options)
        for place, (codec, options) in enumerate([("libx264", X264), ("libx265", X265)] * 2)
    ]
    numbers: dict[Path, list[int]] = {}

    def decode(path: Path) -> None:
        frames = gpu_frames(dali, path, list(range(40)))
        numbers[path] = [read_number(shrink(frame, SCALE)) for frame in frames]

    threads = [threading.Thread(target=decode, args=(path,)) for path in clips]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert numbers == {path: list(range(40)) for path in clips}


@pytest.mark.parametrize("patch_grid", [(4, 10), (16, 32), (10, 4)])
def test_patches_made_on_the_gpu_are_the_cpus(patch_grid: tuple[int, int]) -> None:
    frames = torch.from_numpy(decode_frames(real_clip(BIKES), [0, 100]))
    expected = make_patches(frames, patch_grid, 14)
    difference = (make_patches(frames.cuda(), patch_grid, 14).cpu() - expected).abs() * 127.5
    # An H100 differs by 2 in single pixels where a frame is enlarged.
    assert difference.max() <= 2.001, "resizing differs by more than two of 255"
    assert difference.mean() < 0.02


def test_the_service_gives_the_gpus_patches(tmp_path: Path) -> None:
    from megatron_keye.data.video.dali import DaliDecoder

    vision = tiny_vision(patch_size=8)
    clips = [make_clip(tmp_path / f"{name}.mp4", 30, scale=SCALE, options=X264) for name in "ab"]
    chunks = [
        [
            Picture(
                medium=Medium(str(clips[chunk % 2]), "video"), frame=frame, patch_grid=(12, 32)
            )
            for frame in range(chunk, 30, 7)
        ]
        for chunk in range(6)
    ]
    device = torch.device("cuda", 0)
    in_place = list(decode_chunks(chunks, DaliDecoder(device), vision))
    on_cpu = list(decode_chunks(chunks, PyavDecoder(), vision))
    with DecodeService(DaliDecoder(device), vision, DecodeConfig()) as service:
        service.start_step(chunks)
        for mine, alone, cpu in zip(chunks, in_place, on_cpu, strict=True):
            patches = service.take()
            assert patches.is_cuda and len(patches) == len(mine) * 12 * 32
            assert torch.equal(patches, alone), "not bit for bit what decoding in place gives"
            assert ((patches.cpu() - cpu).abs() * 127.5).mean() < MEAN_DIFFERENCE
