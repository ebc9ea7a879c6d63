# SPDX-License-Identifier: Apache-2.0
"""Times, trace and drawing of a timeline follow from its spans alone."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from megatron_keye.estimate.break_even import fit_break_even
from megatron_keye.observe import gantt
from megatron_keye.observe.recorder import StepRecorder
from megatron_keye.observe.span import Span, SpanName
from megatron_keye.observe.timeline import Timeline, chrome_trace, read_steps, write_step
from tests.support.tiny import tiny_run


def span(name: SpanName, start: float, end: float) -> Span:
    return Span(name=name, label="x <1>", start=start, end=end)


STEP = Timeline(
    spans={
        0: [span("wait", 0, 1), span("forward", 1, 2), span("wait", 2, 4), span("backward", 4, 6)],
        1: [span("encode", 0, 1), span("vision", 5, 8), span("send", 0.5, 1.5)],
    },
    peak_memory_mib={0: 0.0, 1: 0.0},
)


def test_waits_are_not_busy_and_overlaps_count_once() -> None:
    assert STEP.seconds == 8
    assert STEP.busy_seconds(0) == 3
    assert STEP.busy_seconds(1) == STEP.vision_seconds() == 4.5
    assert STEP.decoder_seconds() == 3


def test_what_a_rank_wrote_is_read_back(tmp_path: Path) -> None:
    run = tiny_run().with_overrides([f"output_dir={tmp_path}"])
    recorder = StepRecorder(torch.device("cpu"))
    with recorder.span("encode", "chunk 0"):
        pass
    weight = torch.ones(1, requires_grad=True)
    recorder.backward_of(loss := weight * 2, "micro-batch 0")
    loss.backward()
    for step in (4, 5):
        write_step(run.folder, step, 3, torch.device("cpu"), recorder)
    steps = read_steps(run.folder)
    assert list(steps) == [4, 5]
    assert steps[5].spans == {3: recorder.spans()}
    names = [(s.name, s.label) for s in steps[4].spans[3]]
    assert names == [("encode", "chunk 0"), ("backward", "micro-batch 0")]


def test_a_missing_timeline_raises_with_the_setting_that_records_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.records_timeline=true"):
        read_steps(tmp_path)


def test_trace_and_drawing_hold_every_span() -> None:
    events = json.loads(json.dumps(chrome_trace({0: STEP, 1: STEP})))["traceEvents"]
    bars = [event for event in events if event["ph"] == "X"]
    assert len(bars) == 14
    assert max(bar["ts"] + bar["dur"] for bar in bars) == pytest.approx(16e6)
    drawing = ElementTree.fromstring(gantt.draw(STEP.spans, "a & b"))
    titles = [title.text for title in drawing.iter("{http://www.w3.org/2000/svg}title")]
    assert "vision x <1>: 3000.0 ms" in titles and len(titles) == 7


def test_the_fit_recovers_the_break_even_size() -> None:
    frames = [[64] * 100, [1024] * 8, [4096] * 2]
    seconds = [sum(2e-6 * n * (1 + n / 3000) for n in sizes) for sizes in frames]
    assert fit_break_even(frames, seconds) == 3000
    with pytest.raises(ValueError, match="--fit-vision"):
        fit_break_even(frames, [1.0, 0.001, 0.0001])
