# SPDX-License-Identifier: Apache-2.0
"""A file of conversations is checked as a whole, and holds no conversation in memory."""

import json
import tracemalloc
from pathlib import Path

import pytest

from megatron_keye.config import DataConfig
from megatron_keye.data.source import ConversationFile
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.errors import UserError
from tests.support.clips import tiny_model


def opened(path: Path) -> ConversationFile:
    config = DataConfig(samples=str(path), row_tokens=64)
    return ConversationFile(path, load_tokenizer("qwen"), config, tiny_model())


def line(text: str) -> str:
    return json.dumps({"messages": [{"role": "assistant", "content": text}]})


def text_of(source: ConversationFile, index: int) -> str:
    (sample,) = source.load([index])
    return load_tokenizer("qwen").decode(sample.token_ids.tolist())


def test_lines_are_read_by_number_whatever_separates_them(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(f"\ufeff{line('one')}\r\n\n  \n{line('zwei ä')}\n{line('three')}".encode())
    source = opened(path)
    assert source.num_samples == 3
    for index in (2, 0, 1, 0):
        assert ("one", "zwei ä", "three")[index] in text_of(source, index)
        assert source.name(index) == f"{path}:{(1, 4, 5)[index]}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"{line('fine')}\n\n{{oops\n".encode(), "bad.jsonl:3: is not valid JSON"),
        (b"\n", "bad.jsonl: holds no samples"),
        (line("fine").encode() + b"\n\xff\xfe\x00", "bad.jsonl:2: is not UTF-8"),
    ],
)
def test_malformed_lines_are_named_before_the_run(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        opened(path)


def test_a_file_that_is_written_to_is_not_read_on(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(line("as it was"))
    source = opened(path)
    # One that takes its name leaves the samples of the run alone.
    (tmp_path / "new.jsonl").write_text(line("another"))
    (tmp_path / "new.jsonl").rename(path)
    assert "as it was" in text_of(source, 0)
    source = opened(path)
    with path.open("a") as stream:
        stream.write("\n")
    with pytest.raises(UserError, match="s.jsonl: was written to during the run"):
        source.load([0])


def test_memory_does_not_hold_the_file(tmp_path: Path) -> None:
    path, num_lines = tmp_path / "s.jsonl", 4_000
    path.write_text("\n".join(line(f"{number} {'word ' * 200}") for number in range(num_lines)))
    load_tokenizer("qwen")
    tracemalloc.start()
    source = opened(path)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.num_samples == num_lines
    assert kept_bytes < path.stat().st_size / 20
