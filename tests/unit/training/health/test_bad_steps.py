# SPDX-License-Identifier: Apache-2.0
"""Bad steps are told with their samples, kept in a file, limited, and answered as configured."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.config import HealthConfig, RunConfig
from megatron_keye.errors import UserError
from megatron_keye.training.health.bad_step import BadStep, bad_step_file
from megatron_keye.training.health.bad_steps import BadSteps
from megatron_keye.training.health.judge import Finding, Judge
from tests.support.metrics import step_metrics
from tests.support.tiny import text_rows, tiny_run

SICK = Finding(
    reason="not finite: loss (rank 2)",
    is_spike=False,
    sick_ranks={"loss": [2]},
    sick_tensors=["decoder.norm.weight (rank 2)"],
    verdict="computed again it is the same to the bit",
)
SPIKE = Finding(reason="loss 9 is 20 standard deviations above 2", is_spike=True)
SKIPPED = step_metrics(was_applied=False, loss=math.nan, gradient_norm=math.inf)


def run_in(folder: Path, **health: Any) -> RunConfig:
    run = tiny_run(training={"health": HealthConfig(**health)})
    return replace(run, output_dir=str(folder))


def note(bad: BadSteps, judge: Judge, step: int, finding: Finding | None, metrics: Any) -> bool:
    judge.finding = finding
    rows = text_rows(0)
    return bad.note(
        step, metrics, rows=rows, data={"num_drawn": [4]}, checkpoint=Path("step-00000002")
    )


def bad_steps(run: RunConfig, rank: int = 0) -> tuple[BadSteps, Judge]:
    judge = Judge(run)
    return BadSteps(run, judge, rank=rank), judge


def test_a_bad_step_is_told_and_written_with_what_runs_it_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not note(*bad_steps(run), 7, SICK, SKIPPED)
    file = bad_step_file(run, 7)
    (message,) = [record.message for record in caplog.records]
    for part in ("step 7 changed no weight", SICK.reason, "decoder.norm", SICK.verdict, str(file)):
        assert part in message
    assert "sample 100-0, sample 100-1, sample 101-0 and 5 more" in message
    read = BadStep.read(file)
    assert math.isnan(read.loss) and read.gradient_norm == math.inf
    assert read.data == {"num_drawn": [4]} and read.checkpoint == "step-00000002"
    assert read.samples == [list(row.sample_names) for row in text_rows(0)]
    assert "NaN" not in file.read_text(), "JSON has none"
    other = bad_steps(run_in(tmp_path / "other"), rank=1)
    note(*other, 7, SICK, SKIPPED)
    assert not (tmp_path / "other").exists(), "rank 0 writes"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"step": 1}'])
def test_a_file_that_is_none_is_refused_by_name(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "step-00000001.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=r"^--replay: got '.*step-00000001\.json'"):
        BadStep.read(file)


def test_only_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = run_in(tmp_path, max_bad_steps=3)
    bad, judge = bad_steps(run)
    for step, is_bad in enumerate((True, True, False, True), start=1):
        finding, metrics = (SICK, SKIPPED) if is_bad else (None, step_metrics())
        assert not note(bad, judge, step, finding, metrics)
    # Also across a resume.
    resumed, judge = bad_steps(run)
    resumed.load_state_dict(json.loads(json.dumps(bad.state_dict())))
    assert not note(resumed, judge, 5, SICK, SKIPPED)
    match = "max_bad_steps: got 3 steps in a row.*step 6 .*sample 100-0.*learning_rate too high"
    with pytest.raises(UserError, match=match):
        note(resumed, judge, 6, SICK, SKIPPED)


def test_the_limit_may_lead_back_to_a_checkpoint(tmp_path: Path) -> None:
    bad, judge = bad_steps(run_in(tmp_path, max_bad_steps=2, after_bad_steps="roll_back"))
    assert not note(bad, judge, 1, SICK, SKIPPED)
    assert note(bad, judge, 2, SICK, SKIPPED)


@pytest.mark.parametrize(
    ("action", "goes_back"), [("warn", False), ("skip", False), ("roll_back", True)]
)
def test_a_spike_is_answered_as_configured(action: str, goes_back: bool, tmp_path: Path) -> None:
    run = run_in(tmp_path, on_spike=action)
    metrics = step_metrics(was_applied=action == "warn")
    assert note(*bad_steps(run), 3, SPIKE, metrics) == goes_back
    assert bad_step_file(run, 3).is_file()


def test_a_spike_or_suspect_hardware_may_end_the_run(tmp_path: Path) -> None:
    suspect = replace(SPIKE, is_irreproducible=True)
    with pytest.raises(UserError, match="on_spike=stop: step 3 changed no weight, loss 9"):
        note(*bad_steps(run_in(tmp_path, on_spike="stop")), 3, SPIKE, SKIPPED)
    with pytest.raises(UserError, match="on_irreproducible=stop: step 3"):
        note(*bad_steps(run_in(tmp_path, on_irreproducible="stop")), 3, suspect, SKIPPED)
    # Suspect hardware says nothing about the rows.
    assert not note(*bad_steps(run_in(tmp_path, on_spike="roll_back")), 3, suspect, SKIPPED)


def test_a_run_that_learned_nothing_does_not_end_well(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    bad, judge = bad_steps(run)
    with pytest.raises(UserError, match="no step changed a weight.*indexer_loss_weight=1.0"):
        bad.check_learned(0, step_metrics())
    note(bad, judge, 1, None, step_metrics(loss=math.nan))
    with pytest.raises(UserError, match="no step had a label to learn from"):
        bad.check_learned(1, step_metrics(loss=math.nan))
    note(bad, judge, 2, None, step_metrics())
    bad.check_learned(2, step_metrics(loss=math.nan))
