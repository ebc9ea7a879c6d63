# SPDX-License-Identifier: Apache-2.0
"""The closing table has units, and the checkpoint's path can be copied from any terminal."""

import pytest

from megatron_keye.training.step_sums import StepSums
from megatron_keye.training.summary import show_summary
from tests.support.metrics import step_metrics


def test_the_checkpoint_is_printed_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/rather/deep/folder/of/shared/storage/runs/keye_30b_a3b/checkpoints/step-00001000"
    show_summary({"run": "r", "device": "x" * 90, "checkpoint": path}, note="n" * 90)
    lines = capsys.readouterr().out.splitlines()
    assert f"checkpoint: {path}" in lines and "n" * 90 in lines
    assert sum(line.count("x") for line in lines) == 90, "folded, not cut"
    assert not any("\u2026" in line for line in lines)


def test_figures_have_units(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"run": "r", "wall_seconds": 3723.0, "tokens": 12_345_678, "ranks": {"decoder": 2}}
    sums = StepSums()
    sums.add(step_metrics())
    show_summary(summary | sums.figures() | {"checkpoint": None}, note="")
    text = capsys.readouterr().out
    shown = dict(
        tuple(cell.strip() for cell in line.strip("\u2502").split("\u2502"))
        for line in text.splitlines()
        if "\u2502" in line
    )
    assert shown == {
        "wall time": "1:02:03",
        "tokens seen": "12,345,678",
        "ranks": "decoder: 2",
        "last loss": "1.934",
        "rate": "1,851,852 tokens/s",
        "rate per rank": "345.6 TFLOP/s",
        "MFU": "35.1%",
        "mean step": "1.08 s",
        "peak memory": "71.25 GiB",
        "pictures": "300",
        "padding": "5.0%",
    }
    assert "checkpoint" not in text
