# SPDX-License-Identifier: Apache-2.0
"""The benchmark of generation compares what is the same but for time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_case_writes_its_lines_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    words = ["--layers", "1", "--repeats", "2", "--tokens", "150", "--batches", "1", "3"]
    words += ["--answers", "3", "--new-tokens", "5", "--out", str(out)]
    words += ["--cases", "prefill", "decode", "graphs", "answers"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark_generate", *words],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    prefill, *decoded, pages, log_probs = lines
    assert [line["op"] for line in decoded] == ["decode", "decode", "graphs", "graphs"]
    assert prefill["op"] == "prefill" and prefill["piece_tokens"] == 150
    assert [line["batch"] for line in decoded] == [1, 3, 1, 3]
    # Two pages of 64 tokens are shared, and each answer has one of its own.
    assert (pages["pages_of_one"], pages["pages_of_all"]) == (3, 2 + 3)
    assert log_probs["drawn"] == 15
    assert log_probs["largest_difference"] < 1e-5
    assert not any(line["proves_speed"] for line in lines)
