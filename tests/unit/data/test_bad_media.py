# SPDX-License-Identifier: Apache-2.0
"""A sample whose medium is no name, missing or damaged can be skipped, and is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.reading import read_each, reading
from megatron_keye.data.store.make import make_store
from megatron_keye.errors import UserError
from tests.support.clips import tiny_model

MODEL = tiny_model()
RED = Image.new("RGB", (56, 40), "red")


def damaged(kind: str, place: int, wrong: bytes) -> Callable[[Path], str]:
    """Return a function that writes a red image with some wrong bytes."""

    def write(folder: Path) -> str:
        path = folder / f"damaged.{kind.lower()}"
        RED.save(path, kind)
        content = bytearray(path.read_bytes())
        content[place : place + len(wrong)] = wrong
        path.write_bytes(content)
        return path.name

    return write


def folder_name(folder: Path) -> str:
    (folder / "folder.png").mkdir()
    return "folder.png"


# How to write a bad medium and return its name, and how its sentence goes on.
BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda folder: "gone.png", "gone.png is not there"),
    "empty name": (lambda folder: "", "media name: got ''"),
    "folder": (folder_name, "folder.png is a folder"),
    "long name": (lambda folder: "x" * 300, "is no file name, expected at most 255 bytes"),
    "base64": (lambda folder: "iVBORw0KGgo" * 900, "is no file name, expected at most 255 bytes"),
    "base64 in parts": (lambda folder: "/9j/4AAQSkZJRg" * 99, r"\(1,386 characters\).*not there"),
    "data url": (lambda folder: "data:image/png;base64,iVBOR", "holds a file instead of its name"),
    "null": (lambda folder: "a\0.png", "is no file name"),
    "another host": (lambda folder: "file://host/a.png", "is on the machine .host."),
    "url": (lambda folder: "HTTPS://host/a.png", "https://host/a.png: is a URL"),
    "avif": (damaged("AVIF", 81, b"\xff"), r"as an image \(RuntimeError: Failed"),
    "dds": (damaged("DDS", 80, b"\4\0\0\0ABCD"), r"as an image \(NotImplementedError: Unimpl"),
    "png": (damaged("PNG", 17, b"\xff"), "cannot be read as an image"),
    "no image": (lambda folder: "samples.jsonl", "samples.jsonl: cannot be read as an image"),
}


def write_samples(folder: Path) -> DataConfig:
    """Write a sample with each of the bad media, and a good one at last."""
    RED.save(folder / "good.png")
    names = [*(write(folder) for write, _ in BAD.values()), "good.png"]
    turns = [{"role": "user", "content": "<image>A"}, {"role": "assistant", "content": "Yes."}]
    records = [{"messages": turns, "images": [name]} for name in names]
    path = folder / "samples.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return DataConfig(
        samples=str(path),
        row_tokens=64,
        shuffles=False,
        on_bad_sample="skip",
        frames=FrameConfig(max_tokens_per_image=16),
    )


def assert_named(reasons: list[str], path: Path) -> None:
    assert len(reasons) == len(BAD)
    for number, (reason, (_, words)) in enumerate(zip(reasons, BAD.values(), strict=True), 1):
        with pytest.raises(UserError, match=f"^{path}:{number}: .*{words}"):
            raise UserError(reason)
        assert len(reason) < 1500 and "\n" not in reason


def test_all_bad_media_are_skipped(tmp_path: Path) -> None:
    config = write_samples(tmp_path)
    loader = RowLoader(config, MODEL, seed=0)
    (row,) = loader.next_rows(1)
    assert set(row.sample_names) == {f"{config.samples}:{len(BAD) + 1}"}
    assert_named(loader.take_skipped()[: len(BAD)], Path(config.samples))
    # Records are checked when the file is opened, media when their sample is drawn.
    with pytest.raises(UserError, match="samples.jsonl:4: "):
        RowLoader(replace(config, on_bad_sample="refuse"), MODEL, seed=0)


def test_all_bad_media_are_left_out_of_a_store(tmp_path: Path) -> None:
    config = write_samples(tmp_path)
    samples, store = Path(config.samples), tmp_path / "store"
    totals = make_store(samples, store, config, MODEL, num_workers=1, skips_bad=True)
    assert (totals["num_samples"], totals["num_refused"]) == (1, len(BAD))
    assert_named((store / "refused.txt").read_text().splitlines(), samples)


@pytest.mark.parametrize(
    "error",
    [
        *(RuntimeError("a"), NotImplementedError(), MemoryError(), AssertionError("a"), OSError()),
        *(ValueError("a"), IndexError("a"), OverflowError("a"), RecursionError("a"), KeyError(1)),
        *(PermissionError(13, "Permission denied"), UnicodeDecodeError("u", b"a", 0, 1, "a")),
    ],
)
def test_whatever_a_library_raises_names_the_file(error: Exception) -> None:
    def broken() -> int:
        raise error

    with (
        pytest.raises(UserError, match="^a.png: cannot be read as an image"),
        reading("a.png", "an image"),
    ):
        broken()
    items = read_each((broken() for _ in range(1)), "a.png", "an image")
    with pytest.raises(UserError, match="^a.png: cannot be read as an image"):
        next(items)


def test_the_border_is_around_the_library_alone() -> None:
    """What is done with an item, and what ends a process, keep their class."""
    assert list(read_each(range(3), "a.png", "an image")) == [0, 1, 2]
    with pytest.raises(AssertionError, match="ours"):
        for _ in read_each(range(3), "a.png", "an image"):
            raise AssertionError("ours")
    with pytest.raises(KeyboardInterrupt), reading("a.png", "an image"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="^as it is$"), reading("a.png", "an image"):
        raise UserError("as it is")
