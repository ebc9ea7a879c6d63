# SPDX-License-Identifier: Apache-2.0
"""The profiler starts a run by itself and leaves a picture of it."""

import json
from pathlib import Path

import pytest

from megatron_keye.cli import profile
from megatron_keye.profiling.profile import read_profile


@pytest.mark.slow
def test_a_run_leaves_its_timeline_and_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "device=cpu", "--set", "training.rows_per_step=1"]
    counts = ["--ranks", "2", "--warm-up", "1", "--steps", "1", "--traced", "1"]
    command = ["keye_tiny", *counts, "--out", str(tmp_path), *settings]
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
    decoder, vision = read_profile(tmp_path / "profile.json").ranks
    assert "vision.linear" in {module.module for module in vision.modules}
    assert {module.module for module in decoder.modules} >= {"decoder.experts", "transport"}
    assert "vision.linear" not in {module.module for module in decoder.modules}
