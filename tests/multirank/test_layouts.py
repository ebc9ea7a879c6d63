# SPDX-License-Identifier: Apache-2.0
"""n ranks equal one rank: losses, gradient norms and every updated weight, for every axis."""

import pytest

from megatron_keye.data.row import PackedRow
from tests.support.layouts import FOUR_RANKS
from tests.support.tiny import mixed_rows, packed_row, text_rows, tiny_run
from tests.support.train import Trained, assert_same_training, train

TWO_RANKS = {
    "tensor and sequence": {"tensor": 2},
    "uneven pipeline": {"pipeline": 2, "last_stage_layers": 1},
    "interleaved pipeline": {"pipeline": 2, "virtual_stages": 2},
    "context": {"context": 2},
    "data": {"data": 2},
    "expert over data ranks": {"data": 2, "expert": 2},
    "expert over tensor ranks": {"tensor": 2, "expert": 2},
    "expert over context ranks": {"context": 2, "expert": 2},
}
DEDICATED = {
    "one decoder, one vision": {"vision_ranks": 1},
    "one decoder, two vision": {"vision_ranks": 2},
    "one decoder, three vision": {"vision_ranks": 3},
    "two data, one vision": {"data": 2, "vision_ranks": 1},
    "two tensor, two vision": {"tensor": 2, "vision_ranks": 2},
    "two context, one vision": {"context": 2, "vision_ranks": 1},
    "two pipeline, two vision": {"pipeline": 2, "vision_ranks": 2},
    "one decoder, two vision, shared ends": {"vision_ranks": 2, "shared_micro_batches": 1},
    "interleaved pipeline, one vision, shared ends": {
        "pipeline": 2,
        "virtual_stages": 2,
        "vision_ranks": 1,
        "shared_micro_batches": 1,
    },
}


@pytest.mark.parametrize("degrees", TWO_RANKS.values(), ids=TWO_RANKS)
def test_two_ranks_train_as_one(degrees: dict[str, int], one_rank: Trained) -> None:
    assert_same_training(train(tiny_run(**degrees)), one_rank)


@pytest.mark.parametrize("degrees", FOUR_RANKS.values(), ids=FOUR_RANKS)
def test_combinations_train_as_one(degrees: dict[str, int], one_rank: Trained) -> None:
    assert_same_training(train(tiny_run(**degrees)), one_rank)


@pytest.mark.parametrize("degrees", DEDICATED.values(), ids=DEDICATED)
def test_dedicated_vision_ranks_train_as_one(degrees: dict[str, int], one_rank: Trained) -> None:
    assert_same_training(train(tiny_run(**degrees)), one_rank)


@pytest.mark.parametrize("chunk_patches", [1, 10_000])
def test_training_does_not_depend_on_the_chunk_size(chunk_patches: int, one_rank: Trained) -> None:
    run = tiny_run(data=1, vision_ranks=2, chunk_patches=chunk_patches)
    assert_same_training(train(run), one_rank)


@pytest.mark.parametrize(
    ("recompute", "degrees"),
    [("experts", {"context": 2, "expert": 2}), ("selective", {"tensor": 2})],
)
def test_recomputed_layers_train_as_kept_ones(
    recompute: str, degrees: dict[str, int], one_rank: Trained
) -> None:
    run = tiny_run(training={"recompute": recompute}, **degrees)
    assert_same_training(train(run), one_rank)


def test_layers_recomputed_in_a_pipeline_keep_the_selection_of_each_row(one_rank: Trained) -> None:
    run = tiny_run(pipeline=2, virtual_stages=2, training={"recompute": "full"})
    assert_same_training(train(run), one_rank)


@pytest.mark.parametrize("phase", ["dense", "indexer_warmup"])
def test_every_phase_trains_as_one_rank(phase: str) -> None:
    training = {"phase": phase}
    expected = train(tiny_run(training=training))
    got = train(tiny_run(tensor=2, context=2, training=training))
    assert_same_training(got, expected)


@pytest.mark.parametrize(
    "degrees",
    [{"pipeline": 2, "virtual_stages": 2, "data": 2}, {"tensor": 2, "context": 2}],
    ids=["pipeline x data", "tensor x context"],
)
def test_dense_rows_beside_sparse_ones_train_as_one_rank(degrees: dict[str, int]) -> None:
    training = {"dense_up_to": 34}
    expected = train(tiny_run(training=training))
    assert_same_training(train(tiny_run(**degrees, training=training)), expected)


def test_text_alone_trains_with_unused_vision_ranks() -> None:
    batches = [text_rows(0), mixed_rows(1), text_rows(2)]
    expected = train(tiny_run(), batches)
    assert_same_training(train(tiny_run(vision_ranks=2), batches), expected)


@pytest.mark.parametrize(
    "degrees",
    [{"vision_ranks": 3}, {"data": 2, "vision_ranks": 2}],
    ids=["one decoder", "two data"],
)
def test_more_vision_ranks_than_pictures_train_as_one(degrees: dict[str, int]) -> None:
    batches = [one_picture(step) for step in range(2)]
    expected = train(tiny_run(), batches)
    assert_same_training(train(tiny_run(**degrees), batches), expected)


@pytest.mark.parametrize(
    "degrees",
    [{"pipeline": 2, "vision_ranks": 2}, {"tensor": 2, "data": 2}],
    ids=["dedicated", "colocated"],
)
def test_one_huge_video_beside_text_trains_as_one(degrees: dict[str, int]) -> None:
    batches = [one_huge_video(step) for step in range(2)]
    expected = train(tiny_run(), batches)
    assert_same_training(train(tiny_run(**degrees), batches), expected)


@pytest.mark.parametrize(
    "degrees", [{"pipeline": 2}, {"pipeline": 2, "vision_ranks": 1}, {"tensor": 2}]
)
def test_the_projector_alone_trains_as_on_one_rank(degrees: dict[str, int]) -> None:
    """A micro-batch of text alone then has no gradient at all."""
    training = {"frozen": ("vision", "decoder", "indexer")}
    expected = train(tiny_run(training=training))
    assert_same_training(train(tiny_run(training=training, **degrees)), expected)


EIGHT_RANKS = {
    "one decoder, seven vision": {"vision_ranks": 7},
    "uneven pipeline of three, five vision": {
        "pipeline": 3,
        "first_stage_layers": 2,
        "vision_ranks": 5,
    },
    "tensor, context, data, colocated": {"tensor": 2, "context": 2, "data": 2},
    "interleaved pipeline, tensor, expert, four vision": {
        "pipeline": 2,
        "virtual_stages": 2,
        "tensor": 2,
        "expert": 2,
        "vision_ranks": 4,
    },
    "pipeline, context, data, expert, colocated": {
        "pipeline": 2,
        "context": 2,
        "data": 2,
        "expert": 4,
    },
}


@pytest.mark.slow
def test_eight_ranks_train_as_one_on_every_mix_of_rows() -> None:
    batches = [one_huge_video(0), mixed_rows(1), text_rows(2), one_picture(3)]
    expected = train(tiny_run(), batches)
    for name, degrees in EIGHT_RANKS.items():
        run = tiny_run(**degrees)
        assert run.parallel.num_ranks == 8, name
        assert_same_training(train(run, batches), expected)


def one_huge_video(step: int) -> list[PackedRow]:
    """Return a global batch whose one row is all video, and whose others are text alone."""
    video = packed_row(50 + step, (1, ((6, 6),) * 5))
    return [*text_rows(step)[:2], video, text_rows(step)[3]]


def one_picture(step: int) -> list[PackedRow]:
    """Return a global batch with a single picture."""
    return [packed_row(70 + step, (12, ((2, 4),))), *text_rows(step)[:3]]
