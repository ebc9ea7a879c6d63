"""Skipped samples are written to TensorBoard by name."""

import dataclasses
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_keye.training.report import Report
from tests.support.tiny import tiny_run


def test_skipped_samples_reach_tensorboard(tmp_path: Path) -> None:
    run = dataclasses.replace(tiny_run(), output_dir=str(tmp_path))
    with Report(run, 0, 3) as report:
        report.show_skipped(1, 0, [])
        report.show_skipped(2, 2, ["s.jsonl:3: a.mp4 is not there", "s.jsonl:9: b.mp4 is cut"])
        report.show_skipped(3, 2, [])
    events = EventAccumulator(str(run.folder / "events"))
    events.Reload()
    counts = [(event.step, event.value) for event in events.Scalars("data/skipped_samples")]
    assert counts == [(1, 0.0), (2, 2.0), (3, 2.0)]
    texts = events.Tensors("data/skipped/text_summary")
    assert [event.step for event in texts] == [2]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert "a.mp4 is not there" in text and "b.mp4 is cut" in text
