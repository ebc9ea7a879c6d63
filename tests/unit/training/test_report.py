"""The step's line is short and tells what is out of the ordinary; every sink gets every step."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_keye.training.report import Report, describe_step, short_number, short_time
from tests.support.metrics import step_metrics
from tests.support.tiny import tiny_run


def test_a_step_of_a_long_run_fits_into_120_columns() -> None:
    figures = describe_step(step_metrics(), seconds_left=2 * 86_399.0)
    assert figures == (
        "loss 1.9341  KL 0.123  lr 9.8e-05  norm 0.57  1.85M tok/s  MFU 35.1%  1.08 s  71 GiB  "
        "left 47:59:58"
    )
    assert len(f"step 100000/200000  {figures}") <= 120


def test_what_is_not_known_is_not_shown_and_what_is_wrong_is() -> None:
    metrics = step_metrics(
        indexer_kl=math.nan,
        mfu=math.nan,
        vision_wait_seconds=0.2,
        gradient_norm=math.inf,
        was_applied=False,
    )
    assert describe_step(metrics, seconds_left=math.nan) == (
        "loss 1.9341  lr 9.8e-05  norm inf  1.85M tok/s  3.5e+02 TFLOP/s  1.08 s  71 GiB  "
        "vision waits 0.2 s for pictures  no update: a bad step"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (525.4, "525"),
        (999.6, "1K"),
        (18_460, "18.5K"),
        (1_851_851, "1.85M"),
        (3e9, "3G"),
    ],
)
def test_a_number_is_shortened(value: float, shown: str) -> None:
    assert short_number(value) == shown


def test_a_duration_is_readable_from_seconds_to_weeks() -> None:
    assert [short_time(s) for s in (0.4, 3723, 359_999, 1_000_000)] == [
        "0:00:00",
        "1:02:03",
        "99:59:59",
        "11 d 13 h",
    ]


def test_the_time_left_is_that_of_the_steps_after_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(tiny_run(), output_dir=str(tmp_path))
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr("megatron_keye.training.report.time.monotonic", lambda: next(clock))
    with Report(run, 4, 20) as report:
        for step in (5, 6, 7):
            report.show(step, step_metrics())
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("step 5/20  loss") and "left" not in first
    assert second.endswith("left 0:02:20") and third.endswith("left 0:03:15")


def test_skipped_samples_and_validations_reach_every_sink(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dataclasses.replace(tiny_run(), output_dir=str(tmp_path))
    reasons = ["s.jsonl:3: a.mp4 is not there", "s.jsonl:9: b.mp4 is cut"]
    with Report(run, 0, 3) as report:
        report.show_skipped(1, 0, [])
        report.show_skipped(2, 2, reasons)
        report.show_skipped(3, 2, [])
        report.show_validation(3, {"all": {"loss": 1.5}, "films": {"loss": 1.25}})
    assert capsys.readouterr().out == "validation after step 3: all 1.5000, films 1.2500\n"
    events = EventAccumulator(str(run.folder / "events"))
    events.Reload()
    counts = [(event.step, event.value) for event in events.Scalars("data/skipped_samples")]
    assert counts == [(1, 0.0), (2, 2.0), (3, 2.0)]
    texts = events.Tensors("data/skipped/text_summary")
    assert [event.step for event in texts] == [2]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert all(reason in text for reason in reasons)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 2, "skipped_samples": 2, "reasons": reasons},
        {"step": 3, "validation": {"all": {"loss": 1.5}, "films": {"loss": 1.25}}},
    ]
