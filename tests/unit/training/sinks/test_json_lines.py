# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl has each step once, is valid JSON, and survives a crash at any byte."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.config.run import RunConfig
from megatron_keye.training.sinks.json_lines import JsonLines
from tests.support.metrics import step_metrics
from tests.support.tiny import tiny_run


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    run = dataclasses.replace(tiny_run(), output_dir=str(tmp_path))
    run.folder.mkdir()
    return run


def lines_of(run: RunConfig) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def write(run: RunConfig, first: int, last: int, loss: float) -> None:
    sink = JsonLines(run, first)
    for step in range(first + 1, last + 1):
        sink.log_step(step, step_metrics(loss=loss))
        sink.log_validation(step, {"all": {"loss": loss}})
    sink.close(failed=False)


def test_a_step_is_one_object_with_every_metric(run: RunConfig) -> None:
    metrics = step_metrics(mfu=math.nan, gradient_norm=math.inf, was_applied=False)
    sink = JsonLines(run, 0)
    sink.log_step(1, metrics)
    # Complete before the sink is closed, as a killed process leaves it.
    expected = dataclasses.asdict(metrics) | {"step": 1, "mfu": None, "gradient_norm": None}
    assert lines_of(run) == [expected]
    sink.close(failed=False)


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 2}'])
def test_a_resumed_run_continues_after_the_step_that_it_resumes_from(
    run: RunConfig, torn: str
) -> None:
    write(run, 0, 3, loss=1.0)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(run, 2, 4, loss=2.0)
    steps = [(line["step"], line["loss"]) for line in lines_of(run) if "loss" in line]
    assert steps == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    validations = [(line["step"], line["validation"]) for line in lines_of(run)[1::2]]
    assert validations == [(step, {"all": {"loss": loss}}) for step, loss in steps]
