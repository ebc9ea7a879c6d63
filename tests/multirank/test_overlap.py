# SPDX-License-Identifier: Apache-2.0
"""Vision and decoder overlap, as the simulator predicts from the same plan."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_keye.config import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.estimate.simulate import Simulated, StepCosts, simulate
from megatron_keye.estimate.workload import work_of
from megatron_keye.observe.span import Span, SpanName
from megatron_keye.plan.order import Pass
from megatron_keye.plan.places import DecoderPlace, decoder_place
from megatron_keye.plan.step import StepPlan
from megatron_keye.training.microbatch import balance_rows, plan_rows
from tests.support.ranks import run_on_ranks
from tests.support.tiny import packed_row, tiny_run
from tests.support.train import (
    build_step,
    encoded_ahead,
    let_go,
    train_announced,
    without_work_ahead,
)

TIME_TOLERANCE = 0.15
"""Relative, of a step's time: what no span covers, on ranks that share two cores."""
IDLE_TOLERANCE = 0.1
"""Absolute, of a rank's idle share."""
ATTEMPTS = 8
"""Recordings of which one must agree, since other processes may disturb some."""
ROWS = 8
Spans = dict[int, list[Span]]


def record(run: RunConfig, rows: list[PackedRow]) -> Spans:
    """Train two steps on all ranks and return the second one's spans without the optimizer's."""
    answers = run_on_ranks(run.parallel.num_ranks, _record_on_rank, run.to_json(), rows)
    return {
        rank: [span for span in spans if span.name != "optimizer"]
        for rank, spans in enumerate(answers)
    }


def _record_on_rank(run_json: str, rows: list[PackedRow]) -> Any:
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    for number in range(2):
        step(rows, number)
    assert step.recorder is not None
    let_go(model)
    return step.recorder.spans()


def video_rows() -> list[PackedRow]:
    return [packed_row(seed, (12, ((4, 6), (4, 6), (4, 6)))) for seed in range(ROWS)]


def recording_run(**degrees: int) -> RunConfig:
    training = {"rows_per_step": ROWS, "records_timeline": True}
    return tiny_run(training=training, chunk_patches=72, **degrees)


def seconds(spans: list[Span], names: tuple[SpanName, ...], label: str) -> float:
    return sum(s.end - s.start for s in spans if s.name in names and s.label == label)


def replay(plan: StepPlan, run: RunConfig, spans: Spans) -> Simulated:
    """Simulate the step with the recorded spans as its costs."""

    def vision(chunk: int, *names: SpanName) -> float:
        return seconds(spans[plan.chunks[chunk].vision_rank], names, f"chunk {chunk}")

    def decoder(place: DecoderPlace, step: Pass) -> float:
        rank = next(
            rank
            for rank in range(run.parallel.decoder.num_ranks)
            if decoder_place(run.parallel.decoder, rank) == place
        )
        name: SpanName = "forward" if step.is_forward else "backward"
        return seconds(
            spans[rank],
            (name,),
            f"micro-batch {step.micro_batch}, virtual stage {step.virtual_stage}",
        )

    costs = StepCosts(
        encode=lambda chunk: vision(chunk, "decode", "encode", "send"),
        vision_backward=lambda chunk: vision(chunk, "vision"),
        decoder=decoder,
        exchange=lambda _: 0.0,
    )
    return simulate(work_of(plan, run.parallel.decoder.data), run.parallel, costs)


@pytest.mark.parametrize(
    "degrees", [{"vision_ranks": 1}, {"pipeline": 2, "vision_ranks": 2}], ids=["two", "four"]
)
def test_a_real_step_runs_as_simulated(degrees: dict[str, int]) -> None:
    run, rows = recording_run(**degrees), video_rows()
    plan = plan_rows(balance_rows(rows, run), run)
    for attempt in range(ATTEMPTS):
        real = record(run, rows)
        simulated = replay(plan, run, real)
        for rank, spans in real.items():
            for names in (("forward", "backward"), ("encode",), ("vision",)):
                assert _order(spans, names) == _order(simulated.spans[rank], names)
        _assert_overlap(real, run.parallel.decoder.num_ranks)
        if _takes_as_long(simulated, real) or attempt + 1 == ATTEMPTS:
            break
    ends = max(span.end for spans in real.values() for span in spans)
    assert _takes_as_long(simulated, real), (simulated.seconds, ends)


def _takes_as_long(simulated: Simulated, real: Spans) -> bool:
    """Return whether the step's time and every rank's idle share agree with the real step."""
    ends = max(span.end for spans in real.values() for span in spans)
    busy = {rank: sum(s.end - s.start for s in simulated.spans[rank]) for rank in real}
    return simulated.seconds == pytest.approx(ends, rel=TIME_TOLERANCE) and all(
        simulated.idle_share(rank) == pytest.approx(1 - busy[rank] / ends, abs=IDLE_TOLERANCE)
        for rank in real
    )


def _order(spans: list[Span], names: tuple[str, ...]) -> list[tuple[str, str]]:
    chosen = [span for span in spans if span.name in names]
    return [(span.name, span.label) for span in sorted(chosen, key=lambda span: span.start)]


def test_a_rank_without_pictures_takes_part_in_returning_gradients_when_they_are_due() -> None:
    """Else vision waits, for all replicas, until that rank's next forward pass or its end."""
    run = recording_run(data=2, vision_ranks=1)
    rows = [packed_row(seed, (36, ())) if seed % 2 else video_rows()[seed] for seed in range(ROWS)]
    plan = plan_rows(balance_rows(rows, run), run)
    own = {rank: [plan.receives(rank, number) for number in range(ROWS // 2)] for rank in range(2)}
    assert any(not each for rank in own for each in own[rank]), "a rank without pictures"
    real = record(run, rows)
    for rank in own:
        passes = _order(real[rank], ("forward", "backward", "return"))
        due = [
            [label.partition(",")[0] for _, label in passes[place : place + 2]]
            for place, (name, _) in enumerate(passes)
            if name == "backward"
        ]
        assert due == [[f"micro-batch {number}"] * 2 for number in range(ROWS // 2)], passes


def _assert_overlap(real: Spans, num_decoder: int) -> None:
    """Backward passes of vision begin before the decoder's last forward pass."""
    decoder = [span for rank in range(num_decoder) for span in real[rank]]
    last_forward = max(span.start for span in decoder if span.name == "forward")
    for rank in range(num_decoder, len(real)):
        assert min(span.start for span in real[rank] if span.name == "vision") < last_forward


@pytest.mark.parametrize(
    "degrees", [{"vision_ranks": 1}, {"pipeline": 2, "vision_ranks": 2}], ids=["two", "four"]
)
def test_frozen_vision_ranks_work_a_step_ahead(degrees: dict[str, int]) -> None:
    run, rows = recording_run(**degrees), video_rows()
    run = replace(run, training=replace(run.training, frozen=("vision", "projector")))
    first, second, figures = train_announced(run, rows)
    num_decoder = run.parallel.decoder.num_ranks
    decoder = [span for rank in range(num_decoder) for span in first[rank]]
    decoder_ends = max(span.end for span in decoder if span.name == "backward")
    for rank in range(num_decoder, run.parallel.num_ranks):
        assert min(span.start for span in encoded_ahead(first[rank])) < decoder_ends
        assert not encoded_ahead(second[rank]), "nothing is announced after the second step"
    not_ahead, _, expected = train_announced(without_work_ahead(run), rows)
    assert not any(encoded_ahead(spans) for spans in not_ahead)
    assert figures == expected
