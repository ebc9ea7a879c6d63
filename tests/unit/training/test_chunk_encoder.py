"""Chunks of steps that were announced ahead come out as those of steps that were not."""

import pytest
import torch

from megatron_keye.data.row import PackedRow
from megatron_keye.parallel.plan import Chunk, PictureSlot, StepPlan
from megatron_keye.parallel.recorder import Recorder
from megatron_keye.training.chunk_encoder import ChunkEncoder
from megatron_keye.vision import VisionTower
from tests.support.tiny import SyntheticPatches, packed_row, tiny_run

RUN = tiny_run()
CPU = torch.device("cpu")


def step(seed: int) -> tuple[StepPlan, list[PackedRow]]:
    """Return a plan with a chunk for each picture of a row, and one of another rank's."""
    row = packed_row(seed, (5, ((4, 6), (2, 2), (2, 4))))
    slots = [
        PictureSlot(0, index, start, picture.num_patches, picture.num_tokens(2))
        for index, (picture, start) in enumerate(
            zip(row.pictures, row.picture_starts, strict=True)
        )
    ]
    chunks = tuple(Chunk(vision_rank=int(slot.index == 1), pictures=(slot,)) for slot in slots)
    return StepPlan(chunks=chunks, shipments=(), exchanges=()), [row]


def make_encoder() -> ChunkEncoder:
    tower = VisionTower(RUN.model.vision, RUN.model.decoder.hidden_size)
    tower.reset_parameters(1)
    return ChunkEncoder(RUN, tower, SyntheticPatches(), CPU, rank=0)


def test_announcing_ahead_changes_no_feature() -> None:
    steps = [step(seed) for seed in (1, 2, 3)]
    plain, ahead = make_encoder(), make_encoder()
    for planned in steps:
        ahead.announce(*planned)
    for number, (plan, rows) in enumerate(steps):
        plain.announce(plan, rows)
        for encoder in (plain, ahead):
            encoder.start_step(plan, rows, Recorder())
        for chunk in plan.chunks_of(0):
            assert torch.equal(plain.encode(chunk), ahead.encode(chunk))
        assert plain.num_pictures == ahead.num_pictures == 2, f"step {number}"


def test_another_step_than_the_announced_one_is_noticed() -> None:
    encoder = make_encoder()
    encoder.announce(*step(1))
    with pytest.raises(AssertionError, match="order in which they were announced"):
        encoder.start_step(*step(2), Recorder())
