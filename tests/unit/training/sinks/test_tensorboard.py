# SPDX-License-Identifier: Apache-2.0
"""TensorBoard shows a run under both sets of names, and each step once."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

from megatron_keye.config.run import RunConfig
from megatron_keye.training.sinks.sink import step_scalars, validation_scalars
from megatron_keye.training.sinks.tensorboard import TensorBoard
from tests.support.metrics import step_metrics
from tests.support.tiny import tiny_run


def lost_after_step_3_and_resumed_from_2(folder: Path) -> RunConfig:
    run = dataclasses.replace(tiny_run(), output_dir=str(folder))
    for first, last in ((0, 3), (2, 4)):
        sink = TensorBoard(run, first)
        for step in range(first + 1, last + 1):
            sink.log_step(step, step_metrics(loss=float(10 * first + step)))
        sink.log_validation(last, {"all": {"loss": 2.0}})
        sink.log_skipped(last, first, ["why"] if first == 0 else [])
        sink.close(failed=first == 0)
    return run


@pytest.fixture(params=[event_accumulator, plugin_event_accumulator], ids=["old", "new"])
def loader(request: pytest.FixtureRequest) -> Any:
    """Return each of TensorBoard's own readers."""
    return request.param.EventAccumulator


def test_a_curve_does_not_go_back_in_time_after_a_crash(loader: Any, tmp_path: Path) -> None:
    run = lost_after_step_3_and_resumed_from_2(tmp_path)
    events = loader(str(run.folder / "events"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    points = points_of(events, loader)
    for name in ("train/loss", "lm loss"):
        assert points[name] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)], name
    assert points["lm loss validation"] == [(4, 2.0)], "the one after step 3 was taken back"
    assert points["data/skipped_samples"] == [(4, 2.0)]
    assert [event.step for event in events.Tensors("run/text_summary")] == [1, 3]
    text = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '    "name": "tiny"' in text


def points_of(events: Any, loader: Any) -> dict[str, list[tuple[int, float]]]:
    if loader is event_accumulator.EventAccumulator:
        names = events.Tags()["scalars"]
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}
    return {
        name: [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(name)]
        for name in events.Tags()["tensors"]
        if not name.endswith("text_summary")
    }


def test_steps_have_the_names_of_megatron_lm_too() -> None:
    scalars = step_scalars(step_metrics(), num_rows=4)
    ours = {name: value for name, value in scalars.items() if name.startswith("train/")}
    assert ours.keys() == {f"train/{f.name}" for f in dataclasses.fields(step_metrics())}
    assert {name: value for name, value in scalars.items() if name not in ours} == {
        "lm loss": 1.9341,
        "grad-norm": 0.57,
        "learning-rate": 9.8e-5,
        "batch-size": 4.0,
        "iteration-time": 1.08,
        "throughput": 345.6,
        "mem-max-allocated-bytes": 71.25 * 2**30,
    }


def test_validations_have_the_names_of_megatron_lm_too() -> None:
    losses = {"all": {"loss": 1.0, "recall": 0.5}, "films": {"loss": 40.0}}
    assert validation_scalars(losses) == {
        "validation/all/loss": 1.0,
        "validation/all/recall": 0.5,
        "validation/films/loss": 40.0,
        "lm loss validation": 1.0,
        "lm loss validation ppl": math.e,
        "lm loss validation-films": 40.0,
        "lm loss validation-films ppl": math.exp(20.0),
    }
