# SPDX-License-Identifier: Apache-2.0
"""A simulated step never deadlocks, loses no work, and is no faster than its busiest rank."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_keye.config import DecoderParallel, ParallelConfig, VisionParallel
from megatron_keye.estimate.simulate import Simulated, StepCosts, simulate
from megatron_keye.estimate.workload import work_of
from megatron_keye.plan.cost import VisionCost
from megatron_keye.plan.step import PictureSlot, StepPlan, plan_step

ROW = 96
DECODERS = [
    DecoderParallel(),
    DecoderParallel(data=2, pipeline=3),
    DecoderParallel(tensor=2, context=2, pipeline=2),
    DecoderParallel(pipeline=2, virtual_stages=2, data=2),
]
VISIONS = [
    VisionParallel(chunk_patches=40),
    *(
        VisionParallel(placement="dedicated", num_ranks=count, chunk_patches=40)
        for count in (1, 2, 5)
    ),
    *(
        VisionParallel(
            placement="dedicated", num_ranks=2, shared_micro_batches=count, chunk_patches=40
        )
        for count in (1, 2)
    ),
]
COSTS = StepCosts(
    encode=lambda _: 1.0,
    vision_backward=lambda _: 3.0,
    decoder=lambda _, step: 1.0 if step.is_forward else 2.0,
    exchange=lambda _: 0.1,
)


def random_pictures(generator: np.random.Generator, num_rows: int) -> list[PictureSlot]:
    """Draw rows with one huge video, with some pictures, and with none."""
    slots = []
    for row in range(num_rows):
        count, largest = [(0, 1), (3, 6), (1, 90)][int(generator.integers(3))]
        start = 0
        for index in range(count):
            tokens = int(generator.integers(1, largest + 1))
            slots.append(
                PictureSlot(
                    row=row, index=index, start=start, num_patches=4 * tokens, num_tokens=tokens
                )
            )
            start += tokens
    return slots


def simulated(
    parallel: ParallelConfig, pictures: list[PictureSlot], num_rows: int, *, returns: bool = True
) -> tuple[StepPlan, Simulated]:
    plan = plan_step(
        pictures,
        num_rows=num_rows,
        row_tokens=ROW,
        parallel=parallel,
        cost=VisionCost(100),
        returns_gradients=returns,
    )
    return plan, simulate(work_of(plan, parallel.decoder.data), parallel, COSTS)


@pytest.mark.parametrize("returns", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    "vision", VISIONS, ids=lambda v: f"{v.placement} {v.num_ranks} {v.shared_micro_batches}"
)
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: f"{d.num_ranks} decoder ranks")
def test_no_mix_of_rows_deadlocks_and_every_chunk_runs_once(
    decoder: DecoderParallel, vision: VisionParallel, returns: bool
) -> None:
    parallel = ParallelConfig(decoder=decoder, vision=vision)
    generator = np.random.default_rng(0)
    for _ in range(5):
        num_rows = 4 * decoder.data
        pictures = random_pictures(generator, num_rows)
        plan, step = simulated(parallel, pictures, num_rows, returns=returns)
        spans = [span for own in step.spans.values() for span in own]
        wanted = sorted(f"chunk {number}" for number in range(len(plan.chunks)))
        assert sorted(span.label for span in spans if span.name == "encode") == wanted
        returned = sorted(span.label for span in spans if span.name == "vision")
        assert returned == (wanted if returns else [])
        busiest = max(sum(s.end - s.start for s in own) for own in step.spans.values())
        assert step.seconds >= busiest
        assert all(0 <= step.idle_share(rank) <= 1 for rank in step.spans)


def one_video(num_rows: int) -> list[PictureSlot]:
    return [
        PictureSlot(row=row, index=0, start=0, num_patches=40, num_tokens=10)
        for row in range(num_rows)
    ]


def test_vision_works_while_the_decoder_does() -> None:
    parallel = ParallelConfig(vision=VisionParallel(placement="dedicated", num_ranks=1))
    _, step = simulated(parallel, one_video(10), 10)
    vision = sum(span.end - span.start for span in step.spans[1])
    decoder = sum(span.end - span.start for span in step.spans[0])
    assert (vision, decoder) == (pytest.approx(40), pytest.approx(30))
    # The ends cannot overlap: the first chunk's encoding and the last one's backward. Vision, the
    # longer, works almost from start to end.
    assert step.seconds < 1.05 * vision


def test_the_decoder_waits_for_its_first_features_only() -> None:
    costs = StepCosts(
        encode=lambda _: 1.0,
        vision_backward=lambda _: 1.0,
        decoder=lambda _, __: 3.0,
        exchange=lambda _: 0.0,
    )
    parallel = ParallelConfig(vision=VisionParallel(placement="dedicated", num_ranks=1))
    plan, _ = simulated(parallel, one_video(5), 5)
    step = simulate(work_of(plan, 1), parallel, costs)
    starts = [span.start for span in step.spans[0]]
    assert starts == [1 + 3 * number for number in range(10)]
    assert step.seconds == 1 + 30 + 1


def test_a_replica_of_text_alone_holds_nothing_back() -> None:
    vision = VisionParallel(placement="dedicated", num_ranks=1)
    seconds = []
    for data in (1, 2):
        decoder = DecoderParallel(pipeline=2, virtual_stages=2, data=data)
        parallel = ParallelConfig(decoder=decoder, vision=vision)
        pictures = [replace(slot, row=slot.row * data) for slot in one_video(12)]
        seconds.append(simulated(parallel, pictures, 12 * data)[1].seconds)
    assert seconds[0] == pytest.approx(seconds[1])


def test_the_pipeline_bubble_is_that_of_1f1b() -> None:
    parallel = ParallelConfig(decoder=DecoderParallel(pipeline=4))
    _, step = simulated(parallel, [], 12)
    assert step.seconds == (12 + 3) * 3
    assert step.mean_idle_share == pytest.approx(3 / 15)
