# SPDX-License-Identifier: Apache-2.0
"""Every feature goes to exactly the rank that owns its position, whatever the grid."""

import numpy as np
import pytest

from megatron_keye.config import DecoderParallel, ParallelConfig, VisionParallel
from megatron_keye.parallel.context import gathered_order
from megatron_keye.plan.cost import VisionCost
from megatron_keye.plan.places import decoder_place, owned_positions
from megatron_keye.plan.step import PictureSlot, StepPlan, plan_step

ROW = 48
PARALLELS = [
    ParallelConfig(),
    ParallelConfig(decoder=DecoderParallel(tensor=2, context=2, data=2, pipeline=2, expert=2)),
    ParallelConfig(
        decoder=DecoderParallel(data=3), vision=VisionParallel(placement="dedicated", num_ranks=5)
    ),
    ParallelConfig(
        decoder=DecoderParallel(context=3),
        vision=VisionParallel(placement="dedicated", num_ranks=2, chunk_patches=30),
    ),
]


def pictures(num_rows: int) -> list[PictureSlot]:
    generator = np.random.default_rng(0)
    slots = []
    for row in range(num_rows):
        start = int(generator.integers(0, 4))
        for index in range(int(generator.integers(0, 5))):
            tokens = int(generator.integers(1, 8))
            slots.append(
                PictureSlot(
                    row=row, index=index, start=start, num_patches=4 * tokens, num_tokens=tokens
                )
            )
            start += tokens + 2
    return slots


def plan_for(parallel: ParallelConfig, slots: list[PictureSlot]) -> StepPlan:
    num_rows = 2 * parallel.decoder.data
    return plan_step(
        slots,
        num_rows=num_rows,
        row_tokens=ROW,
        parallel=parallel,
        cost=VisionCost(1000),
        returns_gradients=True,
    )


@pytest.mark.parametrize("parallel", PARALLELS, ids=ParallelConfig.describe)
def test_each_feature_reaches_the_owner_of_its_position_once(parallel: ParallelConfig) -> None:
    degrees = parallel.decoder
    num_rows = 2 * degrees.data
    slots = pictures(num_rows)
    plan = plan_for(parallel, slots)
    arrived = set()
    for transfer in plan.transfers:
        place = decoder_place(degrees, transfer.destination)
        assert place.pipeline == 0
        row = transfer.micro_batch * degrees.data + place.data
        owned = owned_positions(ROW, degrees.context, place.context)
        mine = np.split(owned, degrees.tensor)[place.tensor]
        features = [
            (slot.row, slot.start + offset)
            for slot in plan.chunks[transfer.chunk].pictures
            for offset in range(slot.num_tokens)
        ]
        for feature, position in zip(transfer.feature_rows, transfer.positions, strict=True):
            target = (row, int(mine[position]))
            assert features[feature] == target
            assert target not in arrived
            arrived.add(target)
    wanted = {(s.row, s.start + offset) for s in slots for offset in range(s.num_tokens)}
    assert arrived == wanted


@pytest.mark.parametrize("parallel", PARALLELS, ids=ParallelConfig.describe)
def test_chunks_hold_each_picture_once_in_order_and_keep_the_limit(
    parallel: ParallelConfig,
) -> None:
    slots = pictures(2 * parallel.decoder.data)
    plan = plan_for(parallel, slots)
    assert [slot for chunk in plan.chunks for slot in chunk.pictures] == slots
    for chunk in plan.chunks:
        assert chunk.num_patches <= parallel.vision.chunk_patches or len(chunk.pictures) == 1
    tags = [transfer.tag for transfer in plan.transfers]
    assert tags == list(range(len(tags)))


def test_work_is_spread_over_all_vision_ranks() -> None:
    parallel = PARALLELS[2]
    slots = [
        PictureSlot(row=0, index=i, start=i * 2, num_patches=8, num_tokens=2) for i in range(20)
    ]
    plan = plan_for(parallel, slots)
    loads = [sum(plan.chunks[c].num_patches for c in plan.chunks_of(rank)) for rank in range(3, 8)]
    assert loads == [32] * 5


def test_a_step_without_pictures_has_no_transfers() -> None:
    for parallel in PARALLELS:
        plan = plan_for(parallel, [])
        assert plan.chunks == () and plan.transfers == ()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_context_ranks_own_each_position_once_and_gathering_restores_order(
    num_ranks: int,
) -> None:
    parts = [owned_positions(ROW, num_ranks, rank) for rank in range(num_ranks)]
    gathered = np.concatenate(parts)
    assert sorted(gathered) == list(range(ROW))
    assert (gathered[gathered_order(ROW, num_ranks).numpy()] == np.arange(ROW)).all()
    causal_work = [int(part.sum()) for part in parts]
    assert max(causal_work) == min(causal_work)
