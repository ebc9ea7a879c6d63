"""The profiler starts a run by itself and leaves a picture of it."""

import json
from pathlib import Path

import pytest

from megatron_keye.cli import profile


@pytest.mark.slow
def test_a_run_leaves_its_timeline_and_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "device=cpu", "--set", "training.rows_per_step=1"]
    command = ["keye_tiny", "--ranks", "2", "--steps", "2", "--timeline", str(tmp_path), *settings]
    assert profile.main(command) == 0
    text = capsys.readouterr().out
    assert "rank    0  decoder" in text and "rank    1  vision" in text
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    phases = {event["name"] for event in events if event["ph"] == "X"}
    assert phases == {
        *("decode", "encode", "send", "wait", "forward", "backward", "return", "vision"),
        "optimizer",
    }
    assert (tmp_path / "timeline.svg").read_text().startswith("<svg")
    assert not (tmp_path / "keye_tiny" / "checkpoints").exists()
