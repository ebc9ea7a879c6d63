# SPDX-License-Identifier: Apache-2.0
"""The picture of held-out losses has each run and source, and its JSON lines say what ran."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import draw_validation


def _write_run(folder: Path, losses: dict[int, float | None]) -> None:
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"step": 1, "loss": 2.0}]
    for step, loss in losses.items():
        figures = {"text": {"loss": loss}, "all": {"loss": 9.0}}
        lines.append({"step": step, "validation": figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        "device": "CPU",
        "commit": "abc12345",
        "versions": {"torch": "2", "python": "3", "av": "1"},
        "command": "/a/machine's/python -m megatron_keye train",
    }
    (folder / "environment.json").write_text(json.dumps([{}, start]))


def test_each_run_has_a_line_in_the_scale_of_all(tmp_path: Path) -> None:
    _write_run(tmp_path / "one", {10: 2.0, 20: 1.0})
    _write_run(tmp_path / "two", {10: 4.0, 20: None})
    runs = [f"warm & ready={tmp_path / 'one'}", f"cold={tmp_path / 'two'}"]
    picture, lines = tmp_path / "out.svg", tmp_path / "lines.jsonl"
    assert draw_validation.main([*runs, "--out", str(picture), "--lines", str(lines)]) == 0
    # 900 pixels of 20 steps from the left edge at 80, 180 pixels of a loss of 4 up from 240.
    assert 'points="530.0,150.0 980.0,195.0"' in picture.read_text()
    assert 'points="530.0,60.0"' in picture.read_text()
    assert "warm &amp; ready" in picture.read_text() and "20 steps" in picture.read_text()
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    found = [(line["run"], line["step"], line["text"]) for line in written]
    assert found == [("warm & ready", 10, 2.0), ("warm & ready", 20, 1.0), ("cold", 10, 4.0)]
    assert {line["commit"] for line in written} == {"abc1234"}
    assert {line["command"] for line in written} == {"python -m megatron_keye train"}


def test_a_step_that_a_resumed_run_repeats_has_its_last_loss() -> None:
    lines = [{"step": 5, "validation": {"text": {"loss": loss}}} for loss in (3.0, 2.0)]
    assert draw_validation.read_losses(lines) == {"text": [(5, 2.0)]}


@pytest.mark.parametrize("run", ["", "name", "name=missing", "name=empty"])
def test_a_run_without_losses_is_refused(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_run(tmp_path / "empty", {})
    assert draw_validation.main([run, "--out", "out.svg", "--lines", "lines.jsonl"]) == 2
    assert "expected" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.svg")) + list(tmp_path.glob("lines.jsonl"))
