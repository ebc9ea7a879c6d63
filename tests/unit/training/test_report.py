# SPDX-License-Identifier: Apache-2.0
"""The step's line is short and tells what is out of the ordinary; every sink gets every step."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_keye.checkpoint.saver import Saved
from megatron_keye.observe.stragglers import Slowness
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


def test_pause_and_duration_of_a_save_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = step_metrics(save_seconds=0.2, saved_seconds=8.0)
    assert describe_step(metrics, seconds_left=math.nan).endswith("pauses 0.2 s to save")
    saved = Saved(
        folder=tmp_path / "step-00000004", size_bytes=10**9, pause_seconds=0.2, seconds=8.0
    )
    with Report(tiny_run().with_overrides([f"output_dir={tmp_path}"]), 0, 4) as report:
        report.show_saved(saved)
        report.show(5, metrics)
    assert (
        "checkpoint step-00000004: training paused 0.2 s, complete after 8 s (0.12 GB/s per rank)"
        in capsys.readouterr().out
    )
    line = json.loads((tmp_path / "tiny" / "metrics.jsonl").read_text())
    assert (line["save_seconds"], line["saved_seconds"]) == (0.2, 8.0)


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


def test_a_comparison_of_ranks_reaches_every_sink_and_the_console_if_notable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dataclasses.replace(tiny_run(), output_dir=str(tmp_path))
    slow, even = (
        Slowness(
            rank=3,
            role="vision",
            work=work,
            seconds=seconds,
            median_seconds=1.0,
            step_seconds=4.0,
        )
        for work, seconds in (("decode", 2.5), ("encode", 1.1))
    )
    with Report(run, 0, 3) as report:
        report.show_slowness(1, [])
        report.show_slowness(2, [even])
        report.show_slowness(3, [slow, even])
    assert capsys.readouterr().out == f"step 3: {slow}\n"
    events = EventAccumulator(str(run.folder / "events"))
    events.Reload()
    ratios = [(event.step, event.value) for event in events.Scalars("stragglers/encode_ratio")]
    assert ratios == [(2, pytest.approx(1.1)), (3, pytest.approx(1.1))]
    assert [event.value for event in events.Scalars("stragglers/decode_rank")] == [3]
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 3 and last["stragglers"]["decode"] == dataclasses.asdict(slow)


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
