# SPDX-License-Identifier: Apache-2.0
"""What kernels/README.md says: its example runs, and its table names every operator and figure."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.operator_cases import operator_cases

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "kernels" / "README.md").read_text()


def test_the_example_runs_and_every_input_learns(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    assert "mean divergence" in capsys.readouterr().out
    learners = ("q_TIJ", "k_SJ", "gate_TI", "q_THC", "k_SGC", "v_SGC")
    for name in learners:
        assert names[name].grad.isfinite().all() and names[name].grad.abs().sum() > 0, name
    selected_TK, starts = names["indices_TK"], names["key_start_T"]
    is_real_TK = selected_TK >= 0
    assert (selected_TK >= starts[:, None])[is_real_TK].all(), "no key of the other document"


def test_the_table_names_every_operator() -> None:
    table = TEXT.split("## An example")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", table))
    assert set(operator_cases("cpu", torch.float32)) - {"dense_attention_with_lse"} <= named


def test_figures_are_those_of_the_lines_that_it_names() -> None:
    lines = (ROOT / "docs" / "benchmarks" / "kernels_h100.jsonl").read_text().splitlines()
    measured: dict[str, float] = {}
    for line in map(json.loads, lines):
        if line["shape"].get("S") == 131072:
            key = f"{line['op']} {line['impl']} {line.get('selection')} {line['shape'].get('B')}"
            measured[key] = line["median_us"] / 1e3
    rows = TEXT.split("## Measured")[1]
    stated = {float(figure) for figure in re.findall(r"\d+\.\d+", rows.split("| ---")[1])}
    known = set(measured.values())
    for figure in stated:
        digits = len(str(figure).split(".")[1])
        assert any(round(value, digits) == figure for value in known), f"{figure} was not measured"
