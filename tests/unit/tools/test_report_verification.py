# SPDX-License-Identifier: Apache-2.0
"""The page of what is proved is current, and tells what ran from what did not."""

import json
from pathlib import Path

import pytest

from megatron_keye.errors import UserError
from tests.support.doc_pages import ROOT
from tools import report_verification

XML = """<testsuites><testsuite name="pytest">
<testcase classname="tests.kernels.test_a" name="test_x" />
<testcase classname="tests.kernels.test_a" name="test_y"><failure message="no" /></testcase>
<testcase classname="tests.kernels.test_b" name="test_z"><skipped message="no GPU" /></testcase>
</testsuite></testsuites>"""
CHECKS = """[[checks]]
what = "sums"
against = "float64"
within = "rounding"
tests = ["tests/kernels/test_a.py"]

[[never]]
what = "a run on 64 GPUs"
"""


def write_tree(root: Path, runs: str = "", checks: str = CHECKS) -> Path:
    files = {
        "docs/verification/checks.toml": checks,
        "docs/verification/runs.jsonl": runs,
        "docs/benchmarks/x.jsonl": '{"op": "x", "gpu": "H100", "commit": "c", "command": "d"}\n',
        **{
            f"tests/kernels/test_{name}.py": "@pytest.mark.gpu\ndef test_x(): ...\n"
            for name in "ab"
        },
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_page_is_current() -> None:
    got = (ROOT / report_verification.PAGE).read_text()
    assert got == report_verification.page(ROOT), "run: python -m tools.report_verification"


def test_what_ran_is_told_from_what_was_skipped(tmp_path: Path) -> None:
    xml = tmp_path / "results.xml"
    xml.write_text(XML)
    line = report_verification.recorded(xml, "2 x H100", "pytest -m gpu", "NCCL")
    assert line["files"] == ["tests/kernels/test_a.py"]
    assert (line["passed"], line["failed"], line["skipped"]) == (1, 1, 1)
    before = report_verification.page(write_tree(tmp_path / "before"))
    after = report_verification.page(write_tree(tmp_path / "after", json.dumps(line) + "\n"))
    for text in (before, after):
        assert "- a run on 64 GPUs." in text and "- `tests/kernels/test_b.py`" in text
        assert "| 1 | `x.jsonl` | H100 | c | `d` |" in text
    assert "- `tests/kernels/test_a.py`" in before and "| CPU, CI |" in before
    assert "- `tests/kernels/test_a.py`" not in after and "| CPU, CI; 2 x H100 |" in after


def test_nothing_is_recorded_of_a_run_without_tests(tmp_path: Path) -> None:
    xml = tmp_path / "results.xml"
    xml.write_text("<testsuites><testcase classname='a'><skipped /></testcase></testsuites>")
    with pytest.raises(UserError, match="got 1 tests, none of which ran"):
        report_verification.recorded(xml, "m", "c", "")
    xml.write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        report_verification.recorded(xml, "m", "c", "")


def test_a_check_names_a_test_that_is_there(tmp_path: Path) -> None:
    root = write_tree(tmp_path, checks=CHECKS.replace("test_a.py", "test_gone.py"))
    with pytest.raises(UserError, match="test_gone.py, expected the path of a test"):
        report_verification.page(root)
