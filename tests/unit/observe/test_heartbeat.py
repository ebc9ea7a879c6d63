# SPDX-License-Identifier: Apache-2.0
"""A heartbeat says what its rank does, also while an error passes through."""

from pathlib import Path

import pytest
import torch

from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.observe.recorder import Recorder, StepRecorder
from megatron_keye.training.step_clock import StepClock


def test_work_inside_of_work_is_noted_and_forgotten_again() -> None:
    seen: list[str] = []
    beat = Heartbeat(rank=3, publish=lambda beat: seen.append(beat.where()))
    clock = StepClock(beat)
    clock.heartbeat.begin_step(7)
    recorder = Recorder(beat)
    with clock.part("validation"), recorder.span("forward", "micro-batch 2"):
        with recorder.exchange("a neighbour"):
            pass
        with recorder.span("wait", "features of micro-batch 3"):
            pass
    forward = "step 7, forward micro-batch 2"
    expected = ["step 7", "step 7, validation", forward, f"{forward}, waiting for a neighbour"]
    expected += [forward, "step 7, waiting for features of micro-batch 3", forward]
    assert seen == [*expected, "step 7, validation", "step 7"]
    assert beat.num_marks == len(seen) and beat.exchange == ""


def test_an_error_leaves_where_it_came() -> None:
    beat = Heartbeat()
    with pytest.raises(ZeroDivisionError), Recorder(beat).span("encode", "chunk 4"):
        raise ZeroDivisionError
    assert beat.where() == "before the first step, encode chunk 4"


@pytest.mark.parametrize("recorder", [Recorder, StepRecorder])
def test_a_backward_pass_is_noted_until_it_ends(recorder: type[Recorder]) -> None:
    beat, seen = Heartbeat(), []
    beat.note("step")
    device = torch.device("cpu")
    made = StepRecorder(device, beat) if recorder is StepRecorder else Recorder(beat)
    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda gradient: seen.append((beat.work, beat.detail)))
    output = leaf * 2
    made.backward_of(output, "micro-batch 1")
    output.backward()
    assert seen == [("backward", "micro-batch 1")] and beat.work == "step"


def test_only_the_first_step_of_a_process_and_slow_work_may_stand_still() -> None:
    beat = Heartbeat()
    beat.begin_step(21)
    assert beat.is_slow, "kernels are compiled"
    beat.begin_step(22)
    assert not beat.is_slow
    beat.note("decode", "chunk 0")
    assert beat.is_slow


def test_a_heartbeat_is_sent_whole_and_nothing_else_is_one() -> None:
    beat = Heartbeat(rank=5, role="vision 1 of 2", step=4, work="encode", publish=print)
    again = Heartbeat.from_text(beat.to_text())
    beat.publish = None
    assert again == beat
    for text in ("", "{}", "[1]", beat.to_text()[:-1]):
        with pytest.raises(ValueError):
            Heartbeat.from_text(text)


def test_how_to_go_on_follows_the_checkpoints_of_the_run(tmp_path: Path) -> None:
    beat = Heartbeat(folder=str(tmp_path))
    assert beat.how_to_go_on() == "no checkpoint was saved, so the run begins anew"
    for name in ("step-00000008", "step-00000010", "step-00000012.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert beat.how_to_go_on() == "--resume auto goes on after step 10"
