# SPDX-License-Identifier: Apache-2.0
"""The decode service: the same patches as without it, within its limits, and never a hang."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_keye.config import DecodeConfig
from megatron_keye.data.media import Medium
from megatron_keye.data.row import Picture
from megatron_keye.data.video.chunk_patches import decode_chunks
from megatron_keye.data.video.decode_service import DecodeService
from megatron_keye.data.video.pyav import PyavDecoder
from tests.support.clips import make_clip, tiny_vision

VISION = tiny_vision(patch_size=8)
CHUNK_BYTES = 2 * 6 * 16 * 3 * 8 * 8 * 4


class GatedDecoder:
    """Gives frames that hold their index, each only when the gate is open; counts them."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.gate, self.given, self.is_closed = threading.Event(), 0, False
        self.gate.set()

    def frames(self, path: Path, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for index in indices:
            self.gate.wait()
            self.given += 1
            if path.name == "bad.mp4":
                raise ValueError(f"{path}: is bad")
            yield index, torch.full((48, 128, 3), index, dtype=torch.uint8)

    def close(self) -> None:
        self.is_closed = True


def chunks_of(path: Path | str, count: int, first: int = 0) -> list[list[Picture]]:
    """Return chunks of two frames each."""
    frames = [
        Picture(medium=Medium(str(path), "video"), frame=first + frame, patch_grid=(6, 16))
        for frame in range(2 * count)
    ]
    return [frames[place : place + 2] for place in range(0, 2 * count, 2)]


def service(decoder: Any, *, skips_bad: bool = False, **config: Any) -> DecodeService:
    return DecodeService(decoder, VISION, DecodeConfig(**config), skips_bad=skips_bad)


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def test_patches_are_those_of_decoding_in_place(tmp_path: Path) -> None:
    clips = [make_clip(tmp_path / f"{name}.mp4", 12) for name in "ab"]
    steps = [chunks_of(clips[0], 6), [], [*chunks_of(clips[1], 2), *chunks_of(clips[0], 3)]]
    with service(PyavDecoder()) as decoding:
        for step in steps:
            decoding.start_step(step)
        for step in steps:
            for expected in decode_chunks(step, PyavDecoder(), VISION):
                assert torch.equal(decoding.take(), expected), "not bit for bit the same"


@pytest.mark.parametrize(
    ("config", "ahead"),
    [
        ({"max_ahead_chunks": 3}, 3),
        ({"max_ahead_chunks": 99, "max_ahead_mebibytes": 1}, 2**20 // CHUNK_BYTES),
        ({"max_ahead_chunks": 1}, 1),
    ],
)
def test_it_works_ahead_no_further_than_its_limits(config: dict[str, int], ahead: int) -> None:
    decoder = GatedDecoder()
    with service(decoder, **config) as decoding:
        decoding.start_step(chunks_of("clip.mp4", 20))
        decoding.start_step(chunks_of("clip.mp4", 20))
        for taken in range(40):
            due = 2 * min(40, taken + ahead)
            wait_until(lambda due=due: decoder.given >= due)
            if taken < 3:
                time.sleep(0.05)
                assert decoder.given == due, "it went further than its limits"
            first = decoding.take()[0, 0, 0, 0].item()
            assert first == pytest.approx(2 * (taken % 20) / 127.5 - 1)


def test_a_chunk_larger_than_the_limit_is_let_through() -> None:
    pictures = [
        Picture(medium=Medium("clip.mp4", "video"), frame=frame, patch_grid=(6, 16))
        for frame in range(30)
    ]
    with service(GatedDecoder(), max_ahead_mebibytes=1) as decoding:
        decoding.start_step([pictures, pictures])
        assert len(decoding.take()) == len(decoding.take()) == 30 * 6 * 16


def test_the_thread_waits_for_steps_and_the_encoder_for_chunks() -> None:
    decoder = GatedDecoder()
    decoder.gate.clear()
    taken: list[Tensor] = []
    with service(decoder) as decoding:
        decoding.start_step([])
        decoding.start_step(chunks_of("clip.mp4", 1))
        taker = threading.Thread(target=lambda: taken.append(decoding.take()))
        taker.start()
        time.sleep(0.05)
        assert not taken, "a chunk came before it was decoded"
        decoder.gate.set()
        taker.join(5)
        assert len(taken) == 1
        decoding.start_step(chunks_of("clip.mp4", 1))
        decoding.take()


def test_an_error_comes_up_at_its_chunk_with_the_files_name() -> None:
    with service(GatedDecoder()) as decoding:
        decoding.start_step([*chunks_of("good.mp4", 2), *chunks_of("bad.mp4", 1)])
        decoding.take()
        decoding.take()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"bad\.mp4: is bad"):
                decoding.take()


def test_skipping_reports_before_a_step_what_failed_in_it(tmp_path: Path) -> None:
    good = make_clip(tmp_path / "good.mp4", 12)
    steps = [
        [*chunks_of(good, 3), *chunks_of("bad.mp4", 2)],
        [],
        chunks_of(good, 6),
        chunks_of("worse.mp4", 1),
    ]
    with service(PyavDecoder(), skips_bad=True, max_ahead_chunks=1) as decoding:
        for step in steps:
            decoding.start_step(step)
        failed = []
        for step in steps:
            failed.append(decoding.wait_until_decoded())
            for chunk in step:
                if chunk[0].medium.path == str(good):
                    (expected,) = decode_chunks([chunk], PyavDecoder(), VISION)
                    assert torch.equal(decoding.take(), expected), "not bit for bit the same"
                else:
                    assert decoding.take().abs().max() < 0.005, "the picture is not grey"
    assert [list(names) for names in failed] == [["bad.mp4"], [], [], ["worse.mp4"]]
    assert failed[0]["bad.mp4"].startswith("bad.mp4: is not there")


def test_skipping_does_not_wait_for_a_file_that_hangs() -> None:
    decoder = GatedDecoder()
    decoder.gate.clear()
    with service(decoder, skips_bad=True, timeout_seconds=0.5) as decoding:
        decoding.start_step(chunks_of("slow.mp4", 1))
        with pytest.raises(ValueError, match=r"slow\.mp4: gave no frame for 0.5 s"):
            decoding.wait_until_decoded()
        decoder.gate.set()


def test_a_real_files_error_is_reported_as_it_is(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", 3)
    with service(PyavDecoder()) as decoding:
        decoding.start_step(chunks_of(path, 1, first=2))
        with pytest.raises(ValueError, match=r"clip\.mp4: frame 3 .* expected 0 to 2"):
            decoding.take()


def test_a_file_that_hangs_is_named() -> None:
    decoder = GatedDecoder()
    with service(decoder, timeout_seconds=1.0) as decoding:
        decoding.start_step(chunks_of("slow.mp4", 1))
        decoding.take()
        decoder.gate.clear()
        decoding.start_step(chunks_of("slow.mp4", 1))
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"slow\.mp4: gave no frame for 1 s"):
            decoding.take()
        assert time.monotonic() - started > 0.5, "the limit was not waited for"
        decoder.gate.set()


def test_waiting_for_the_encoder_is_no_hang() -> None:
    with service(GatedDecoder(), timeout_seconds=0.5, max_ahead_chunks=1) as decoding:
        decoding.start_step(chunks_of("clip.mp4", 3))
        for _ in range(2):
            time.sleep(0.6)
            decoding.take()


@pytest.mark.parametrize("is_busy", [False, True])
def test_closing_leaves_no_thread(is_busy: bool) -> None:
    before = threading.active_count()
    decoder = GatedDecoder()
    decoding = service(decoder, max_ahead_chunks=100)
    decoding.start_step(chunks_of("clip.mp4", 50 if is_busy else 1))
    wait_until(lambda: decoder.given > 0)
    decoding.close()
    assert threading.active_count() == before
    assert decoder.is_closed


def test_statistics_show_what_was_decoded_and_who_waited() -> None:
    decoder = GatedDecoder()
    with service(decoder, max_ahead_chunks=3) as decoding:
        decoding.start_step(chunks_of("clip.mp4", 3))
        wait_until(lambda: len(decoding._ready) == 3)
        for _ in range(3):
            decoding.take()
        counted = decoding.statistics()
        assert (counted.pictures, counted.takes, counted.ready_chunks) == (6, 3, 3 + 2 + 1)
        assert counted.busy_seconds > 0
        assert decoding.statistics().takes == 0, "statistics were not reset"
