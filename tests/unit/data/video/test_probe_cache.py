# SPDX-License-Identifier: Apache-2.0
"""Probes are shared by the processes of a machine, once each, within a limit."""

import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

from megatron_keye.data.video import probe_cache
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.probe_cache import ProbeCache, node_cache
from megatron_keye.data.video.video_info import VideoInfo
from tests.support.clips import make_clip
from tests.support.corpus import KINDS

NUM_PROCESSES = 4


def probe_and_note(path: Path) -> VideoInfo:
    (path.parent / f"probed-{os.getpid()}").touch()
    return probe(path)


def ask(cache: ProbeCache, path: Path) -> int:
    probe_cache.probe = probe_and_note  # type: ignore[assignment]
    return cache.probe(path).num_frames


def test_processes_that_ask_at_once_read_a_file_once(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", 20)
    cache = ProbeCache(tmp_path / "kept")
    with multiprocessing.get_context("spawn").Pool(NUM_PROCESSES) as pool:
        found = pool.starmap(ask, [(cache, path)] * NUM_PROCESSES, chunksize=1)
    assert found == [20] * NUM_PROCESSES
    assert len(list(tmp_path.glob("probed-*"))) == 1


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    cache, path = ProbeCache(tmp_path / "kept"), make_clip(tmp_path / "clip.mp4", 5)
    assert cache.probe(path).num_frames == 5
    make_clip(path, 7)
    assert cache.probe(path).num_frames == 7
    path.unlink()
    with pytest.raises(ValueError, match=r"clip\.mp4: is not there"):
        cache.probe(path)


def test_damaged_answers_are_made_again_and_errors_are_not_kept(tmp_path: Path) -> None:
    folder, path = tmp_path / "kept", make_clip(tmp_path / "clip.mp4", 5)
    ProbeCache(folder).probe(path)
    (kept,) = (entry for entry in folder.glob("*/*") if entry.is_file())
    kept.write_bytes(kept.read_bytes()[:-3])
    probe_cache._cached.cache_clear()
    assert ProbeCache(folder).probe(path).num_frames == 5
    bad = tmp_path / "bad.mp4"
    bad.write_text("words")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"bad\.mp4: cannot be read"):
            ProbeCache(folder).probe(bad)
    assert len([entry for entry in folder.glob("*/*") if entry.is_file()]) == 1


def test_the_oldest_answers_go_when_the_limit_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_cache, "_NUM_PARTS", 1)
    paths = [make_clip(tmp_path / f"{number}.mp4", 5) for number in range(40)]
    size = len(probe(paths[0]).to_bytes())
    part = tmp_path / "part"
    part.mkdir()
    for number, path in enumerate(paths):
        probe_cache._write(part / f"answer-{number:02d}", probe(path).to_bytes(), 4 * size + 64)
        os.utime(part / f"answer-{number:02d}", ns=(number, number))
    assert sorted(entry.name for entry in part.iterdir()) == [
        f"answer-{number}" for number in range(36, 40)
    ]


def test_a_file_whose_start_does_not_decode_is_refused(tmp_path: Path) -> None:
    """WTV keeps no description of WMV, without which its decoder can't begin."""
    path = tmp_path / "clip.wtv"
    assert KINDS["wmv2"].write(path, 20)
    assert probe(path).num_frames == 20, "the probe itself refuses it"
    with pytest.raises(ValueError, match=r"clip\.wtv: .*copy it again"):
        ProbeCache(tmp_path / "kept").probe(path)


def test_a_folder_of_someone_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    node_cache()
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o77 == 0, "others can write into it"
    monkeypatch.setattr(probe_cache.os, "getuid", lambda: folder.stat().st_uid)
    node_cache()
