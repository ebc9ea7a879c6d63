# SPDX-License-Identifier: Apache-2.0
"""A pass has every sample once, in order, and is the same each time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_keye.config import DataConfig
from megatron_keye.data.one_pass import OnePass
from tests.support.clips import tiny_model

CONFIG = DataConfig(samples="unused", row_tokens=40)


def write(path: Path, lengths: list[int]) -> str:
    turns = [{"role": "assistant", "content": "word " * length} for length in lengths]
    path.write_text("\n".join(json.dumps({"messages": [turn]}) for turn in turns))
    return str(path)


def test_a_pass_has_every_sample_once_in_order_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a=b.jsonl", [9 + number % 5 for number in range(45)])
    rows = OnePass(path, CONFIG, tiny_model(), num_rows=0)
    for _ in range(2):
        read = list(rows)
        names = [name for row in read for name in row.sample_names]
        assert len(read) == len(rows) > 16
        assert names == [f"{path}:{line}" for line in range(1, 46)]
    assert len(list(OnePass(path, CONFIG, tiny_model(), num_rows=3))) == 3


def test_bad_samples_are_found_before_the_first_row(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [3, 99, 4])
    with pytest.raises(ValueError, match=r"s.jsonl:2: is \d+ tokens long"):
        OnePass(path, CONFIG, tiny_model(), num_rows=0)
    rows = OnePass(path, replace(CONFIG, on_bad_sample="skip"), tiny_model(), num_rows=0)
    assert [row.sample_names for row in rows] == [(f"{path}:1", f"{path}:3")]
    assert rows.num_skipped == 1
