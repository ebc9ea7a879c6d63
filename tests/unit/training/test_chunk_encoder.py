# SPDX-License-Identifier: Apache-2.0
"""Announcing and encoding steps ahead changes no feature."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_keye.config import RunConfig
from megatron_keye.data.media import Medium
from megatron_keye.data.row import PackedRow, Picture
from megatron_keye.errors import UserError
from megatron_keye.observe.recorder import Recorder
from megatron_keye.plan.slots import vision_learns
from megatron_keye.plan.step import Chunk, PictureSlot, StepPlan
from megatron_keye.training.chunk_encoder import ChunkEncoder
from megatron_keye.vision import VisionTower
from tests.support.tiny import SyntheticPatches, packed_row, tiny_run

RUN = tiny_run()
CPU = torch.device("cpu")
RANK = 1
"""Of vision alone, where the decoder has one rank."""


def step(seed: int) -> tuple[StepPlan, list[PackedRow]]:
    """Return a plan with a chunk for each picture of a row, and one of another rank's."""
    row = packed_row(seed, (5, ((4, 6), (2, 2), (2, 4))))
    slots = [
        PictureSlot(0, index, start, picture.num_patches, picture.num_tokens(2))
        for index, (picture, start) in enumerate(
            zip(row.pictures, row.picture_starts, strict=True)
        )
    ]
    chunks = tuple(
        Chunk(vision_rank=RANK + int(slot.index == 1), pictures=(slot,)) for slot in slots
    )
    return StepPlan(chunks=chunks, transfers=(), exchanges=(), num_micro_batches=1), [row]


def make_encoder(run: RunConfig = RUN, kept_patches: int = 0) -> ChunkEncoder:
    tower = VisionTower(run.model.vision, run.model.decoder.hidden_size)
    tower.reset_parameters(1)
    learns = vision_learns(run)
    source = SyntheticPatches()
    return ChunkEncoder(
        run, tower, source, CPU, rank=RANK, learns=learns, kept_patches=kept_patches
    )


def trained(kept_patches: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Return features and gradients of two steps, and how often chunks were encoded."""
    encoder = make_encoder(kept_patches=kept_patches)
    tower, features, calls = encoder._vision, [], []
    tower.register_forward_hook(lambda *_: calls.append(1))
    for seed in (1, 2):
        plan, rows = step(seed)
        encoder.announce(plan, rows)
        encoder.start_step(plan, rows, Recorder())
        chunks = plan.chunks_of(RANK)
        made = [encoder.encode(chunk) for chunk in chunks]
        assert not any(each.requires_grad for each in made)
        for chunk, each in zip(chunks, made, strict=True):
            encoder.backward(chunk, each.sin())
        features += made
    gradients = [weight.grad for weight in tower.parameters() if weight.requires_grad]
    assert not encoder._outputs and not encoder._inputs
    return features, [each for each in gradients if each is not None], len(calls)


def test_chunks_with_room_for_their_activations_are_encoded_once_with_equal_gradients() -> None:
    """A step has chunks of 24 and of 8 patches; room is taken in their order."""
    features, gradients, num_calls = trained(0)
    assert num_calls == 2 * 4 and all(each.any() for each in gradients)
    for kept_patches, expected_calls in ((8, 6), (24, 6), (31, 6), (32, 4), (1000, 4)):
        other, others, num_calls = trained(kept_patches)
        assert num_calls == expected_calls
        assert all(map(torch.equal, other, features))
        assert len(others) == len(gradients) and all(map(torch.equal, others, gradients))


def test_a_step_that_ended_early_leaves_its_room_to_the_next_one() -> None:
    encoder = make_encoder(kept_patches=24)
    for seed in (1, 2):
        plan, rows = step(seed)
        encoder.announce(plan, rows)
        encoder.start_step(plan, rows, Recorder())
        first, second = plan.chunks_of(RANK)
        for chunk in (first, second):
            encoder.encode(chunk)
        assert list(encoder._outputs) == [first] and list(encoder._inputs) == [second]


def test_announcing_ahead_changes_no_feature() -> None:
    steps = [step(seed) for seed in (1, 2, 3)]
    plain, ahead = make_encoder(), make_encoder()
    for planned in steps:
        ahead.announce(*planned)
    for number, (plan, rows) in enumerate(steps):
        plain.announce(plan, rows)
        for encoder in (plain, ahead):
            encoder.start_step(plan, rows, Recorder())
        for chunk in plan.chunks_of(RANK):
            assert torch.equal(plain.encode(chunk), ahead.encode(chunk))
        assert plain.num_pictures == ahead.num_pictures == 2, f"step {number}"


def test_a_step_that_was_not_announced_is_refused() -> None:
    encoder = make_encoder()
    encoder.announce(*step(1))
    with pytest.raises(AssertionError, match="order in which they were announced"):
        encoder.start_step(*step(2), Recorder())


def frozen_encoder(mebibytes: int = 1) -> ChunkEncoder:
    run = tiny_run(vision_ranks=1, training={"frozen": ("vision", "projector")})
    vision = replace(run.parallel.vision, max_ahead_mebibytes=mebibytes)
    return make_encoder(replace(run, parallel=replace(run.parallel, vision=vision)))


def test_a_frozen_encoder_works_one_step_ahead_with_equal_features() -> None:
    steps = [step(seed) for seed in (1, 2, 3)]
    plain, ahead = make_encoder(), frozen_encoder()
    ahead.announce(*steps[0])
    for number, (plan, rows) in enumerate(steps):
        plain.announce(plan, rows)
        for later in steps[number + 1 : number + 2]:
            ahead.announce(*later)
        for encoder in (plain, ahead):
            encoder.start_step(plan, rows, Recorder())
        for chunk in plan.chunks_of(RANK):
            assert torch.equal(plain.encode(chunk), ahead.encode(chunk))
        # Two chunks of this rank in the next step, none after the last step.
        assert [ahead.encode_ahead() for _ in range(3)] == [number < 2, number < 2, False]
        assert plain.num_pictures == ahead.num_pictures == 2


@pytest.mark.parametrize(("mebibytes", "num_ahead"), [(0, 0), (1, 2), (2, 3)])
def test_working_ahead_keeps_its_limit(mebibytes: int, num_ahead: int) -> None:
    # A float32 feature of width 32 is 128 bytes: 4000 of them are half a mebibyte and less.
    picture = Picture(medium=Medium("a", "video"), frame=0, patch_grid=(4, 4000))
    slots = [PictureSlot(0, index, 0, 16_000, 4000) for index in range(3)]
    chunks = tuple(Chunk(vision_rank=RANK, pictures=(slot,)) for slot in slots)
    plan = StepPlan(chunks=chunks, transfers=(), exchanges=(), num_micro_batches=1)
    rows = [replace(packed_row(1, (5, ())), pictures=(picture,) * 3)]
    encoder = frozen_encoder(mebibytes)
    encoder.announce(plan, rows)
    assert [encoder.encode_ahead() for _ in range(4)] == [True] * num_ahead + [False] * (
        4 - num_ahead
    )


def test_a_broken_file_of_the_next_step_raises_in_its_step() -> None:
    class Broken(SyntheticPatches):
        def take(self) -> torch.Tensor:
            raise UserError("broken.mp4")

    encoder = frozen_encoder()
    encoder._source = Broken()
    plan, rows = step(1)
    encoder.announce(plan, rows)
    assert not encoder.encode_ahead()
    encoder.start_step(plan, rows, Recorder())
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        encoder.encode(0)
