# SPDX-License-Identifier: Apache-2.0
"""What is missing or damaged in a store is named; zeros are never read in its place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data.store import writer
from megatron_keye.data.store.array import ARRAYS
from megatron_keye.data.store.make import make_store
from megatron_keye.data.store.reader import SampleStore
from megatron_keye.data.store.settings import deciding_settings
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.errors import UserError
from tests.support.clips import make_clip, tiny_model

MODEL = tiny_model()
CONFIG = DataConfig(samples="", row_tokens=512, frames=FrameConfig())
SETTINGS = deciding_settings(load_tokenizer("qwen"), CONFIG, MODEL)


@pytest.fixture(scope="module")
def sound_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store whose arrays have several files each."""
    folder = tmp_path_factory.mktemp("sound")
    Image.new("RGB", (56, 84)).save(folder / "i.png")
    make_clip(folder / "v.mp4", 1)
    question = {"role": "user", "content": "<image><video>A"}
    turns = [question, {"role": "assistant", "content": "Yes."}]
    lines = [json.dumps({"messages": turns, "images": ["i.png"], "videos": ["v.mp4"]})] * 9
    (folder / "s.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_CHUNK_LENGTH", 4)
        patch.setattr(writer, "_SHARD_LENGTH", 8)
        make_store(
            folder / "s.jsonl", folder / "store", CONFIG, MODEL, num_workers=1, skips_bad=False
        )
    return folder / "store"


@pytest.fixture
def store(tmp_path: Path, sound_store: Path) -> Path:
    # With new times, so that the keys of their content are read.
    for name in ("i.png", "v.mp4"):
        shutil.copy(sound_store.parent / name, tmp_path)
    return Path(shutil.copytree(sound_store, tmp_path / "store"))


def read(store: Path) -> int:
    source = SampleStore(store, SETTINGS)
    samples = source.load(range(source.num_samples))
    assert source.video_info(store.parent / "v.mp4") is not None
    return sum(len(sample.token_ids) for sample in samples)


def first_file(store: Path, name: str) -> Path:
    return store / name / "c" / "0" / ("0" if ARRAYS[name][1] else "")


@pytest.mark.parametrize("name", ARRAYS.keys() - {"media/seconds"})
def test_a_lost_file_is_named(store: Path, name: str) -> None:
    assert read(store) > 0
    path = first_file(store, name)
    path.unlink()
    with pytest.raises(UserError, match=f"^{path}: is not there.*prepare the samples again"):
        read(store)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, flip])
@pytest.mark.parametrize("name", ["tokens", "samples/token_bounds", "media/is_video"])
def test_a_damaged_file_is_refused(store: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(first_file(store, name))
    with pytest.raises(UserError, match=f"^{store / name}: cannot be read as an array"):
        read(store)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tokens", {"data_type": "float32"}, r"rows of float32 \[2\], expected int32 \[2\]"),
        ("tokens", {"zarr_format": 2}, "cannot be read as an array"),
        ("tokens", {"shape": [9, 2]}, "has 9 rows, expected"),
        ("samples/lines", {"shape": [5]}, "has 5 rows, expected 9"),
        ("", {"attributes": {"format": "megatron_keye.samples.1"}}, "samples.1', expected"),
    ],
)
def test_other_metadata_are_refused(
    store: Path, name: str, change: dict[str, Any], words: str
) -> None:
    path = store / name / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        read(store)


def test_metadata_that_are_cut_are_refused(store: Path) -> None:
    for name in ("tokens", ""):
        cut(store / name / "zarr.json")
        with pytest.raises(UserError, match=f"^{store / name}: cannot be read"):
            read(store)
