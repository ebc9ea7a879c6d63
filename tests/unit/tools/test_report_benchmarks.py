# SPDX-License-Identifier: Apache-2.0
"""The report shows every line of a file and refuses lines of other form."""

import json
from pathlib import Path

import pytest

from tests.support.doc_pages import ROOT
from tools import report_benchmarks

LINE = {
    "op": "sparse_attention_forward",
    "impl": "triton",
    "shape": {"T": 131072, "S": 131072, "H": 32},
    "selection": "local",
    "median_us": 40_890.0,
    "p10_us": 40_500.0,
    "p90_us": 141_000.0,
    "tflop_per_s": 102.8,
    "peer": "cudnn dense forward",
    "times_faster": 6.113,
    "gpu": "H100",
    "torch": "2.11",
    "triton": "3.6",
    "commit": "abc",
    "command": "python -m pytest tests/kernels --benchmark",
}


def written(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_line_becomes_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {name: value for name, value in LINE.items() if name not in ("peer", "times_faster")}
    decode = plain | {"op": "decode", "shape": {"B": 32, "S": 1000}, "median_us": 800.4}
    path = written(tmp_path / "lines.jsonl", LINE, decode)
    assert report_benchmarks.main([path]) == 0
    shown = capsys.readouterr().out
    assert "H100, torch 2.11, triton 3.6, commit abc; `python -m pytest tests/kernels" in shown
    assert (
        "| 128K | local | sparse_attention_forward, triton | 40.89 ms (40.50 ms to 141 ms) "
        "| 103 | 6.11x cudnn dense forward |" in shown
    )
    assert "| 32 x 1000 | local | decode, triton | 800 us" in shown


def test_each_run_has_a_table() -> None:
    shown = report_benchmarks.tables([LINE, LINE | {"commit": "def"}, LINE])
    assert shown.count("| tokens |") == 2
    assert shown.index("commit abc") < shown.index("commit def")


def test_a_line_of_other_form_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "lines.jsonl", LINE, {"op": "x"})
    assert report_benchmarks.main([path]) == 2
    assert "lines.jsonl, line 2: lacks commit, expected" in capsys.readouterr().err
    (tmp_path / "broken.jsonl").write_text("{")
    assert report_benchmarks.main([str(tmp_path / "broken.jsonl")]) == 2
    assert "broken.jsonl, line 1: is not a JSON object" in capsys.readouterr().err


def test_lines_of_any_form_are_shown_whole(tmp_path: Path) -> None:
    first = {"op": "read", "ranks": 1, "seconds": 16.94, "is_known": True, "notes": ["a", "b|c"]}
    second = first | {"ranks": 4096, "seconds": 20_000.4, "shape": {"S": 7}}
    run = {"commit": "abc", "command": "python x "}
    shown = report_benchmarks.tables([first | run, second | run])
    assert shown.startswith("CPU, commit abc; `python x`\n")
    assert "All lines: op read, is known yes, notes a, b\\|c." in shown
    assert "| ranks | seconds | S |\n" in shown
    assert "| 1 | 16.94 |  |\n| 4,096 | 20,000 | 7 |\n" in shown


def test_each_device_has_a_page(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", LINE, LINE | {"gpu": "H200 141GB"})
    written(tmp_path / "b.jsonl", {"op": "x", "commit": "c", "command": "y"}, LINE)
    assert report_benchmarks.main(["--pages", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.md")} == {"h100.md", "h200_141gb.md", "cpu.md"}
    assert (tmp_path / "h100.md").read_text().count("\n## ") == 2


def test_the_pages_are_current() -> None:
    folder = ROOT / "docs" / "benchmarks"
    expected = report_benchmarks.pages(folder)
    got = {path.name: path.read_text() for path in folder.glob("*.md") if path.name != "README.md"}
    assert got == expected, "run: python -m tools.report_benchmarks --pages docs/benchmarks"
