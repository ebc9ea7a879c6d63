# SPDX-License-Identifier: Apache-2.0
"""Headers are read as the safetensors package writes them, and errors name the damaged file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_keye.checkpoint.hf.safetensors_file import make_header, write_blocks
from megatron_keye.checkpoint.hf.safetensors_index import INDEX, open_folder

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.randn(5).to(torch.bfloat16),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(2, 2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, a="one", b="one", empty="one", c="two")
    return tmp_path


def write_index(folder: Path, **files: str) -> None:
    mapping = {name: f"{file}.safetensors" for name, file in files.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": mapping}))


def test_tensors_are_read_bit_for_bit(folder: Path) -> None:
    entries = open_folder(folder)
    assert entries.keys() == {"a", "b", "empty", "c"}
    for name, expected in TENSORS.items():
        got = entries[name].read()
        assert got.dtype == expected.dtype and torch.equal(got, expected), name
    assert torch.equal(entries["a"].read(2), TENSORS["a"][2])


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shapes = {"a": (3, 4), "d": (4, 3)}
    with path.open("wb") as stream:
        stream.write(make_header(shapes, torch.float32))
        write_blocks(stream, [TENSORS["a"][:1], TENSORS["a"][1:], TENSORS["a"].T])
    loaded = load_file(path)
    assert torch.equal(loaded["a"], TENSORS["a"])
    assert torch.equal(loaded["d"], TENSORS["a"].T)


@pytest.mark.parametrize("cut", [3, 40, 200])
def test_a_file_cut_short_is_named(folder: Path, cut: int) -> None:
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-cut] if cut < 200 else path.read_bytes()[:6])
    with pytest.raises(ValueError, match=r"one\.safetensors: got \d+ bytes, expected at least"):
        open_folder(folder)


def test_an_invalid_header_is_named(folder: Path) -> None:
    (folder / "two.safetensors").write_bytes((8).to_bytes(8, "little") + b"not json" + b" " * 90)
    with pytest.raises(ValueError, match=r"two\.safetensors: got a header"):
        open_folder(folder)


def test_an_index_of_an_absent_file_is_refused(folder: Path) -> None:
    write_index(folder, a="one", b="one", empty="one", c="three")
    with pytest.raises(ValueError, match="got 1 of the 2 files that its index names.*three"):
        open_folder(folder)


def test_an_index_that_places_a_tensor_elsewhere_is_refused(folder: Path) -> None:
    write_index(folder, a="two", b="one", empty="one", c="two")
    with pytest.raises(ValueError, match=r"tensor a: got it in one.*expected it in two"):
        open_folder(folder)


def test_an_index_that_lacks_a_tensor_is_refused(folder: Path) -> None:
    write_index(folder, a="one", b="one", empty="one")
    with pytest.raises(ValueError, match=r"tensor c: got it in two.*expected it in model"):
        open_folder(folder)


def test_an_index_with_a_tensor_that_no_file_holds_is_refused(folder: Path) -> None:
    write_index(folder, a="one", b="one", empty="one", c="two", d="two")
    with pytest.raises(ValueError, match="tensor d: got it in no file"):
        open_folder(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "two.safetensors")
    with pytest.raises(ValueError, match=r"tensor a: got it in one.* and in two"):
        open_folder(folder)


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no \*\.safetensors file"):
        open_folder(tmp_path)
