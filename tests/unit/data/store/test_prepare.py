# SPDX-License-Identifier: Apache-2.0
"""A store has the samples of its file, however often preparing was interrupted."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.records.file import scan
from megatron_keye.data.source import ConversationFile
from megatron_keye.data.store import writer
from megatron_keye.data.store.make import make_store
from megatron_keye.data.store.prepare import BlockMaker
from megatron_keye.data.store.reader import SampleStore
from megatron_keye.data.store.settings import deciding_settings
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.data.video import probe_cache
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.pyav import iterate_frames
from megatron_keye.files.disk import DiskError
from megatron_keye.files.partial_folder import PartialFolder
from tests.support.clips import make_clip, read_number, tiny_model
from tests.support.small_disk import make_read_only, small_disk

MODEL = tiny_model()
FRAMES = FrameConfig(min_tokens_per_frame=1, max_tokens_per_frame=4)
CONFIG = DataConfig(samples="none", row_tokens=512, frames=FRAMES)
TOKENIZER = load_tokenizer("qwen")


def turns(question: Any, answer: str = "Yes.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def record(number: int) -> dict[str, Any]:
    """Return a sample: text, an image, a video or both, in turn."""
    names = {1: {"images": ["i.png"]}, 2: {"videos": ["v.mp4"]}}
    media = names.get(number % 4, {}) if number % 4 < 3 else names[1] | names[2]
    markers = "".join(f"<{key[:-1]}>" for key in media)
    return {"messages": turns(f"{markers}word {number} " + "x " * number)} | media


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    make_clip(tmp_path / "v.mp4", 60)
    Image.new("RGB", (56, 84)).save(tmp_path / "i.png")
    return write_lines(tmp_path / "s.jsonl", [json.dumps(record(n)) for n in range(11)])


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def small_blocks(monkeypatch: pytest.MonkeyPatch, num_lines: int) -> None:
    monkeypatch.setattr(scan, "__defaults__", (num_lines,))


def prepared(samples: Path, out: Path, **options: Any) -> SampleStore:
    options = {"num_workers": 1, "skips_bad": False} | options
    make_store(samples, out, CONFIG, MODEL, **options)
    return opened(out)


def opened(out: Path, config: DataConfig = CONFIG) -> SampleStore:
    return SampleStore(out, deciding_settings(TOKENIZER, config, MODEL))


def assert_same_samples(store: SampleStore, samples: Path) -> None:
    file = ConversationFile(samples, TOKENIZER, CONFIG, MODEL)
    assert store.num_samples == file.num_samples
    backwards = list(range(file.num_samples))[::-1]
    for got, expected in zip(store.load(backwards), file.load(backwards), strict=True):
        assert got.name == expected.name
        assert got.pictures == expected.pictures
        assert got.picture_starts == expected.picture_starts
        np.testing.assert_array_equal(got.token_ids, expected.token_ids, strict=True)
        np.testing.assert_array_equal(got.labels, expected.labels, strict=True)
        np.testing.assert_array_equal(got.weights, expected.weights, strict=True)
    assert [store.measure(n) for n in backwards] == [file.measure(n) for n in backwards]


@pytest.mark.parametrize(("num_lines", "chunk"), [(1, 7), (4, 64), (64, 65_536)])
def test_a_store_gives_the_samples_of_its_file(
    samples: Path, monkeypatch: pytest.MonkeyPatch, num_lines: int, chunk: int
) -> None:
    small_blocks(monkeypatch, num_lines)
    monkeypatch.setattr(writer, "_CHUNK_LENGTH", chunk)
    monkeypatch.setattr(writer, "_SHARD_LENGTH", 3 * chunk)
    store = prepared(samples, samples.parent / "out")
    assert_same_samples(store, samples)
    totals = store.attributes
    assert (totals["num_media"], totals["num_refused"]) == (2, 0)
    assert totals["video_seconds"] == pytest.approx(2.36)
    assert not (samples.parent / "out.partial").exists()


def test_processes_make_the_same_store(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 3)
    store = prepared(samples, samples.parent / "out", num_workers=2)
    assert_same_samples(store, samples)


class Killed(BaseException):
    """Simulates the kill of a process."""


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(0, 8), max_size=3))
def test_interrupted_preparing_resumes(
    samples: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    out = samples.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name("out.partial"), ignore_errors=True)
    made: list[str] = []
    with monkeypatch.context() as patch:
        small_blocks(patch, 2)
        for stop in stops:
            patch.setattr(BlockMaker, "fill", dying_after(stop, made))
            # Six blocks; later calls simulate a kill while the store is written.
            patch.setattr(writer._StoreWriter, "finish", dying)
            with pytest.raises(Killed):
                prepared(samples, out)
            assert not out.exists()
        patch.undo()
        small_blocks(patch, 2)
        patch.setattr(BlockMaker, "fill", dying_after(99, made))
        store = prepared(samples, out)
    assert_same_samples(store, samples)
    assert sorted(made) == sorted(set(made)), "a finished block was made again"


original_fill = BlockMaker.fill


def dying(_: Any) -> None:
    raise Killed


def dying_after(count: int, made: list[str]) -> Callable[..., Any]:
    """Return a `BlockMaker.fill` that is killed in the middle of block number `count`."""
    calls: list[str] = []

    def fill(self: BlockMaker, name: str, stream: Any, advance: Any) -> Any:
        calls.append(name)
        if len(calls) > count:
            stream.write(b"half a block")
            raise Killed
        answer = original_fill(self, name, stream, advance)
        made.append(name)
        return answer

    return fill


def test_each_video_is_read_once(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Path] = []

    def counting(path: Path) -> Any:
        probed.append(path)
        return original(path)

    original = probe_cache.probe
    monkeypatch.setattr(probe_cache, "probe", counting)
    small_blocks(monkeypatch, 2)
    prepared(samples, samples.parent / "out")
    assert probed == [samples.parent / "v.mp4"]


def test_what_was_probed_comes_from_the_store(
    samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a rank reads of a video what it decodes."""
    store, video = prepared(samples, samples.parent / "out"), samples.parent / "v.mp4"
    expected = probe(video)
    assert store.video_info(video) is None, "nothing was loaded that shows it"
    loader = RowLoader(dataclasses.replace(CONFIG, samples=str(store.path)), MODEL, seed=0)
    loader.next_rows(4)
    monkeypatch.setattr(probe_cache, "probe", None)
    found = loader.probe_video(video)
    np.testing.assert_array_equal(found.times, expected.times)
    np.testing.assert_array_equal(found.entries.packets, expected.entries.packets)
    decoded = dict(iterate_frames(video, [3, 50], probe_video=loader.probe_video))
    assert [read_number(frame) for frame in decoded.values()] == [3, 50]


@pytest.fixture
def bad_samples(samples: Path) -> Path:
    (samples.parent / "empty.mp4").touch()
    (samples.parent / "words.mp4").write_text("not a video " * 50)
    lines = samples.read_text().splitlines()
    lines[2] = json.dumps({"messages": turns("<video>"), "videos": ["gone.mp4"]})
    lines[5] = json.dumps({"messages": turns("<video>"), "videos": ["empty.mp4"]})
    lines[6] = "{oops"
    lines[9] = json.dumps({"messages": turns("<video>"), "videos": ["words.mp4"]})
    return write_lines(samples, lines)


def test_bad_samples_are_all_named_and_leave_no_store(
    bad_samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 4)
    out = bad_samples.parent / "out"
    with pytest.raises(ValueError, match="4 of 11 samples are unusable") as raised:
        prepared(bad_samples, out)
    for words in (":3: .*gone.mp4 is not there", ":6: .*empty.mp4: has 0 bytes", ":7: .*JSON"):
        assert raised.match(words)
    assert raised.match(":10: .*words.mp4: cannot be read as a video")
    assert not out.exists()
    # A file that has been restored is probed again; the lines are the same.
    make_clip(bad_samples.parent / "gone.mp4", 5)
    with pytest.raises(ValueError, match="3 of 11 samples are unusable"):
        prepared(bad_samples, out)


def test_skipped_samples_are_counted_and_named_in_the_store(bad_samples: Path) -> None:
    store = prepared(bad_samples, bad_samples.parent / "out", skips_bad=True)
    assert (store.num_samples, store.attributes["num_refused"]) == (7, 4)
    refused = (store.path / writer.REFUSED).read_text().splitlines()
    for reason, line in zip(refused, (3, 6, 7, 10), strict=True):
        assert reason.startswith(f"{bad_samples}:{line}: ")
    names = [store.name(number) for number in range(7)]
    assert names == [f"{bad_samples}:{line}" for line in (1, 2, 4, 5, 8, 9, 11)]


def test_unusable_files_leave_no_store(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "s.jsonl", ["{}", "[]", "3"])
    with pytest.raises(ValueError, match="has no usable sample"):
        prepared(path, tmp_path / "out", skips_bad=True)
    with pytest.raises(ValueError, match="holds no samples"):
        prepared(write_lines(path, ["", ""]), tmp_path / "out")
    with pytest.raises(ValueError, match=r"s.jsonl:2: .*one list of conversations"):
        prepared(write_lines(path, ["[", "{]", "]"]), tmp_path / "out")
    with pytest.raises(ValueError, match=r"gone.jsonl: cannot be read"):
        prepared(tmp_path / "gone.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_settings_or_lines_start_over(samples: Path) -> None:
    out = samples.parent / "out"
    folder = PartialFolder(out, "something else")
    folder.write("block-00000000", lambda stream: stream.write(b"of another time"))
    assert_same_samples(prepared(samples, out), samples)
    with pytest.raises(ValueError, match="--out: got .*, which exists"):
        prepared(samples, out)


def test_other_settings_are_refused_by_name(samples: Path) -> None:
    out = prepared(samples, samples.parent / "out").path
    frames = dataclasses.replace(FRAMES, frames_per_second=1.0, max_tokens_per_frame=9)
    config = dataclasses.replace(CONFIG, frames=frames, loss_tokens="text")
    with pytest.raises(ValueError, match="prepared under other settings") as raised:
        opened(out, config)
    assert raised.match("data.frames.frames_per_second: got 1.0, expected 2.0")
    assert raised.match("data.frames.max_tokens_per_frame: got 9, expected 4")
    assert raised.match("data.loss_tokens: got 'text', expected 'assistant'")
    opened(out, dataclasses.replace(CONFIG, row_tokens=7, packing_window=3, shuffles=False))


def test_changed_media_are_refused_by_name(samples: Path) -> None:
    out = prepared(samples, samples.parent / "out").path
    video, image = samples.parent / "v.mp4", samples.parent / "i.png"
    copied = video.read_bytes()
    video.unlink()
    video.write_bytes(copied)
    assert opened(out).measure(2) > 0, "a copy was taken for another file"
    video.write_bytes(copied[:-1] + bytes([copied[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"s.jsonl:3: .*v.mp4: has changed since"):
        opened(out).measure(2)
    with pytest.raises(ValueError, match=r"v.mp4: has changed since"):
        opened(out).load([0, 2])
    assert opened(out).measure(0) > 0
    image.unlink()
    with pytest.raises(ValueError, match=r"s.jsonl:2: i.png: .* is not there"):
        opened(out).measure(1)


def test_media_that_change_during_preparing_are_refused(
    samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, image = samples.parent / "out", samples.parent / "i.png"
    small_blocks(monkeypatch, 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BlockMaker, "fill", dying_after(3, []))
        prepared(samples, out)
    Image.new("RGB", (84, 56)).save(image)
    with pytest.raises(ValueError, match=r"i.png: changed while the store was made"):
        prepared(samples, out)
    assert not out.exists()


def test_store_and_media_move_together(samples: Path, tmp_path_factory: Any) -> None:
    prepared(samples, samples.parent / "stores" / "out")
    there = tmp_path_factory.mktemp("elsewhere") / "data"
    shutil.move(samples.parent, there)
    moved = opened(there / "stores" / "out")
    assert moved.load([2])[0].pictures[0].medium.path == str(there / "v.mp4")


def test_folders_that_are_no_finished_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder but no store, .*\.partial is continued"):
        opened(tmp_path)
    writer._StoreWriter(tmp_path / "half")
    with pytest.raises(ValueError, match="has the format None"):
        opened(tmp_path / "half")


def test_a_disk_that_does_not_take_a_store_keeps_nothing_of_it(
    samples: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "filler").write_bytes(bytes(2**20 - 64 * 2**10))
        with pytest.raises(DiskError, match=r"store.*: got no space left on the device"):
            make_store(samples, disk / "store", CONFIG, MODEL, num_workers=1, skips_bad=False)
        assert [file.name for file in disk.iterdir()] == ["filler"]
        make_read_only(disk)
        with pytest.raises(DiskError, match=r"store.partial: got a read-only file system"):
            make_store(samples, disk / "store", CONFIG, MODEL, num_workers=1, skips_bad=False)
