# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is whole by its manifest, and every damage of a file is found and named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_keye.checkpoint.manifest import (
    MANIFEST,
    check_sizes,
    check_sums,
    problem_of,
    write_manifest,
)
from megatron_keye.errors import UserError
from megatron_keye.files.written_file import write_file
from tests.support.saved import FILES, make_whole


def garble(path: Path) -> None:
    """Flip a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "garbled": garble,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_damage_of_every_file_is_found(name: str, damage: str, tmp_path: Path) -> None:
    folder = make_whole(tmp_path / "step-00000001")
    check_sums(folder, check_sizes(folder), num_threads=2)
    DAMAGES[damage](folder / name)
    assert damage == "garbled" or problem_of(folder), "sizes alone tell all but a flipped bit"
    with pytest.raises(UserError) as error:
        check_sums(folder, check_sizes(folder))
    assert str(folder if name == MANIFEST else folder / name) in str(error.value)


@pytest.mark.parametrize("is_file", [True, False])
def test_a_name_alone_is_no_checkpoint(is_file: bool, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.write_text("") if is_file else folder.mkdir()
    got = "a file" if is_file else f"no {MANIFEST}"
    assert problem_of(folder).startswith(f"{folder}: got {got}, expected")
    assert problem_of(tmp_path / "none").startswith(f"{tmp_path / 'none'}: got no such folder")


def test_the_folder_of_a_run_is_refused_with_its_newest_checkpoint(tmp_path: Path) -> None:
    newest = [make_whole(tmp_path / "checkpoints" / f"step-0000000{n}") for n in (1, 2)][-1]
    (tmp_path / "checkpoints" / "step-00000003.partial").mkdir()
    problem = problem_of(tmp_path)
    assert "got the folder of a run, expected" in problem and problem.endswith(f"as {newest}")


def test_a_sum_made_in_writing_is_that_of_the_file(tmp_path: Path) -> None:
    written = write_file(tmp_path / "a", lambda out: [out.write(b"ab" * n) for n in (1, 0, 99)])
    assert written[0] == [2, 0, 198]
    write_manifest(tmp_path, {"a": written[1]})
    check_sums(tmp_path, check_sizes(tmp_path))


@pytest.mark.parametrize("text", ["[1]", '{"files": [1]}', '{"files": {"a": {}}}', "\xff"])
def test_a_manifest_of_another_kind_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"{tmp_path / MANIFEST}: cannot be read"):
        check_sizes(tmp_path)
