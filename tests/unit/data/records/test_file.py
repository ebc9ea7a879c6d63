# SPDX-License-Identifier: Apache-2.0
"""Sample files of all forms give the same records, by number and in blocks."""

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.data.records import parquet
from megatron_keye.data.records.file import RecordFile, scan


def numbered(file: RecordFile) -> list[tuple[str, Any]]:
    """Return the names and the values of all records, read from the last to the first."""
    indices = reversed(range(len(file)))
    return [(file.name(index), json.loads(file.read(index))) for index in indices][::-1]


@given(
    lines=st.lists(st.sampled_from(["", "  ", "{}", '{"a": "\u00e9"}', '"x"']), max_size=30),
    per_block=st.integers(1, 7),
    line_end=st.sampled_from(["\n", "\r\n"]),
    ends_early=st.booleans(),
)
def test_lines_are_read_once_by_number_and_by_block(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    per_block: int,
    line_end: str,
    ends_early: bool,
) -> None:
    path = tmp_path_factory.mktemp("scan") / "s.jsonl"
    text = line_end.join(lines) + ("" if ends_early else line_end)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    wanted = [(n, json.loads(line)) for n, line in enumerate(lines, start=1) if line.strip()]
    if not wanted:
        with pytest.raises(ValueError, match=r"s\.jsonl: holds no samples"):
            scan(path, per_block)
        return
    assert numbered(RecordFile(path)) == [(f"{path}:{n}", value) for n, value in wanted]
    file = scan(path, per_block)
    read = [pair for name in file.blocks for pair in file.read(name)]
    assert [(number, json.loads(line)) for number, line in read] == wanted
    assert file.num_samples == len(wanted)
    assert {block.num_samples for block in list(file.blocks.values())[:-1]} <= {per_block}


@given(
    items=st.lists(st.sampled_from([{}, {"a": ["\u00e9", {"b": "],["}]}, 3, "x"]), min_size=1),
    indent=st.sampled_from([None, 0, 2]),
    per_block=st.integers(1, 4),
    has_mark=st.booleans(),
)
def test_items_of_a_list_are_records(
    tmp_path_factory: pytest.TempPathFactory,
    items: list[Any],
    indent: int | None,
    per_block: int,
    has_mark: bool,
) -> None:
    path = tmp_path_factory.mktemp("list") / "s.json"
    text = f"\n {json.dumps(items, indent=indent, ensure_ascii=False)} \n"
    path.write_text(text, encoding="utf-8-sig" if has_mark else "utf-8")
    assert [value for _, value in numbered(RecordFile(path))] == items
    file = scan(path, per_block)
    read = [pair for name in file.blocks for pair in file.read(name)]
    assert [number for number, _ in read] == list(range(1, len(items) + 1))
    assert [json.loads(text) for _, text in read] == items


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", r"s\.json: holds no samples"),
        ('[{"a": 1},\n{"b": }]', r"s\.json:2: is not valid JSON"),
        ('[{"a": 1}\n{"b": 1}]', r"s\.json:2: .*without a comma"),
        ('[{"a": 1},\n\n', r"s\.json:3: ends before the list does"),
        ('[{"a": 1}]\n{"b": 1}', r"s\.json:2: goes on after the end of the list"),
        ("\n[" + "[" * 100_000, r"s\.json:2: is nested too deeply"),
        ("[" + "9" * 5000 + "]", r"s\.json:1: is not valid JSON"),
        (b'["\xff"]', r"s\.json: is not UTF-8"),
    ],
)
def test_malformed_lists_are_named_with_their_line(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=words):
        RecordFile(path)


def test_a_file_that_is_written_to_is_not_read_on(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('"as it was"')
    file = RecordFile(path)
    # One that takes its name leaves the samples of the run alone.
    (tmp_path / "new.jsonl").write_text('"another"')
    (tmp_path / "new.jsonl").rename(path)
    assert file.read(0) == b'"as it was"'
    file = RecordFile(path)
    with path.open("a") as stream:
        stream.write("\n")
    with pytest.raises(ValueError, match=r"s\.jsonl: was written to during the run"):
        file.read(0)
    with pytest.raises(ValueError, match=r"gone: cannot be read"):
        RecordFile(tmp_path / "gone")


@pytest.mark.parametrize("form", ["lines", "list"])
def test_memory_does_not_hold_the_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / "s.json"
    items = [json.dumps(f"{number} {'word ' * 200}") for number in range(2_000)]
    path.write_text("\n".join(items) if form == "lines" else f"[{', '.join(items)}]")
    tracemalloc.start()
    file = RecordFile(path)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(file) == 2_000
    assert kept_bytes < path.stat().st_size / 20


def test_parquet_without_pyarrow_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "s.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(ValueError, match=r"s\.parquet: .*pip install 'megatron-keye\[parquet\]'"):
        RecordFile(tmp_path / "s.parquet")


def test_rows_of_parquet_are_records(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    path = tmp_path / "s.parquet"
    rows = [{"messages": [{"role": "user", "content": str(n)}], "id": n} for n in range(10)]
    write_table(Table.from_pylist(rows), path, row_group_size=4)
    file = RecordFile(path)
    assert [file.read(index) for index in (9, 0, 4, 3)] == [rows[n] for n in (9, 0, 4, 3)]
    blocks = scan(path, 3)
    read = [pair for name in blocks.blocks for pair in blocks.read(name)]
    assert read == list(enumerate(rows, start=1))
    parquet._opened.cache_clear()
    path.write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(ValueError, match=r"s\.parquet: cannot be read as parquet"):
        RecordFile(path)
