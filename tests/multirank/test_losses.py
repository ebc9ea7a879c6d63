# SPDX-License-Identifier: Apache-2.0
"""Which loss trains which weights: language loss and indexer loss never mix."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_keye.config import IndexerConfig, OptimizerConfig, RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.row import RowMeter
from megatron_keye.plan.places import DecoderPlace
from megatron_keye.training.microbatch import cut_row
from tests.support.ranks import run_on_ranks
from tests.support.tiny import ROW_TOKENS, mixed_rows, text_rows, tiny_model, tiny_run
from tests.support.train import (
    WEIGHT_TOLERANCE,
    Trained,
    assert_same_training,
    build_step,
    let_go,
    train,
)

PLAIN = OptimizerConfig(learning_rate=1e-2, clip_gradient_norm=0.0, weight_decay=0.0, epsilon=1e-4)
"""No clipping and no decay, by which one loss could touch another's weights."""


def test_top_k_of_a_whole_row_is_dense_attention() -> None:
    model = tiny_model(indexer=IndexerConfig(num_heads=4, head_dim=8, top_k=ROW_TOKENS))
    sparse = train(tiny_run(model=model, training={"optimizer": PLAIN, "phase": "sparse"}))
    dense = train(tiny_run(model=model, training={"optimizer": PLAIN, "phase": "dense"}))
    for mine, theirs in zip(sparse.metrics, dense.metrics, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.indexer_recall == pytest.approx(1.0, abs=1e-6)
    for name, weight in dense.weights.items():
        if "indexer" not in name:
            worst = float((sparse.weights[name] - weight).abs().max())
            assert worst <= WEIGHT_TOLERANCE, f"{name} differs by {worst:.2e}"


def test_language_loss_never_reaches_the_indexer() -> None:
    training = {"optimizer": PLAIN, "indexer_loss_weight": 0.0}
    trained = train(tiny_run(training=training))
    fresh = train(tiny_run(training=training), [])
    changed = trained.changed(fresh)
    assert changed and not any("indexer" in name for name in changed)


def test_indexer_loss_reaches_nothing_else() -> None:
    weak = train(tiny_run(training={"optimizer": PLAIN, "indexer_loss_weight": 1.0}), _one_step())
    strong = train(
        tiny_run(training={"optimizer": PLAIN, "indexer_loss_weight": 9.0}), _one_step()
    )
    changed = weak.changed(strong)
    assert changed and all("indexer" in name for name in changed)


def test_warm_up_trains_the_indexer_alone_and_lowers_its_loss() -> None:
    training = {"optimizer": PLAIN, "phase": "indexer_warmup", "steps": 12}
    batches = [mixed_rows(0)] * 12
    trained = train(tiny_run(training=training), batches)
    fresh = train(tiny_run(training=training), [])
    changed = trained.changed(fresh)
    assert changed and all("indexer" in name for name in changed)
    assert trained.metrics[-1].indexer_kl < 0.8 * trained.metrics[0].indexer_kl


def test_rows_of_short_documents_attend_densely_and_train_no_indexer() -> None:
    rows = mixed_rows(0)
    assert [row.longest_document for row in rows] == [35, 35, 21, 34]

    def trained(rows: list[PackedRow], **training: object) -> Trained:
        options = {"optimizer": PLAIN, "rows_per_step": len(rows), **training}
        return train(tiny_run(training=options), [rows])

    short, dense = trained(rows[2:], dense_up_to=34), trained(rows[2:], phase="dense")
    changed = short.changed(dense)
    assert not changed, "weights differ from those of the dense phase"
    assert short.metrics[0].loss == dense.metrics[0].loss
    assert math.isnan(short.metrics[0].indexer_kl) and math.isnan(short.metrics[0].indexer_recall)
    mixed, long = trained(rows, dense_up_to=34), trained(rows[:2])
    assert mixed.metrics[0].indexer_kl == pytest.approx(long.metrics[0].indexer_kl, rel=1e-6)
    assert mixed.metrics[0].indexer_recall == long.metrics[0].indexer_recall
    for name, weight in long.weights.items():
        if "indexer" in name:
            # The balancing loss and the language loss have other divisors; the indexer's has not.
            worst = float((mixed.weights[name] - weight).abs().max())
            assert worst <= WEIGHT_TOLERANCE, f"{name} differs by {worst:.2e}"


def test_frozen_decoder_still_trains_the_projector() -> None:
    training = {"optimizer": PLAIN, "frozen": ("vision", "decoder", "indexer")}
    trained = train(tiny_run(vision_ranks=1, training=training))
    fresh = train(tiny_run(training=training), [])
    changed = trained.changed(fresh)
    assert changed and all("projector" in name for name in changed)


def test_frozen_weights_cost_no_backward_products() -> None:
    frozen = ("vision", "decoder", "indexer")
    learning, still = (
        run_on_ranks(1, _backward_flops, tiny_run(training={"frozen": parts}).to_json())[0]
        for parts in ((), frozen)
    )
    # Two products of a matrix backward become one; attention's stay.
    assert still < 0.65 * learning


def test_a_frozen_decoder_has_no_weight_gradients_and_no_buffer_for_them() -> None:
    run = tiny_run(vision_ranks=1, training={"frozen": ("vision", "decoder", "indexer")})
    decoder, vision = run_on_ranks(2, _gradients_after_a_step, run.to_json())
    assert decoder == {}
    assert vision and all(name.startswith("projector.") for name in vision)
    assert all(norm > 0 for norm in vision.values())


def _gradients_after_a_step(run_json: str) -> dict[str, float]:
    """Return the norms of the gradients that this rank's weights have."""
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    step(mixed_rows(0), 0)
    norms = {}
    for wrapped in model.wrapped():
        for name, weight in wrapped.module.named_parameters():
            gradient = getattr(weight, "main_grad", weight.grad)
            if gradient is not None:
                norms[name] = float(gradient.norm())
        assert bool(wrapped.buffers) == any(w.requires_grad for w in wrapped.parameters())
    let_go(model)
    return norms


def _backward_flops(run_json: str) -> float:
    """Count matrix products of one row's decoder beyond those of its forward pass."""
    run = RunConfig.from_json(run_json)
    _, model, _, step = build_step(run)
    row = mixed_rows(0)[1]
    with FlopCounterMode(display=False) as both:
        step([row], 0)
    batch = cut_row(row, run, DecoderPlace(tensor=0, context=0, data=0, pipeline=0, expert=0))
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model.stages[0](
            batch,
            torch.empty(0, 32),
            indexer_loss_weight=0.0,
            meter=RowMeter(),
            where="",
            phase="sparse",
        )
    let_go(model)
    return both.get_total_flops() - forward.get_total_flops()


def test_frozen_vision_gets_no_gradients_and_the_rest_trains() -> None:
    training = {"optimizer": PLAIN, "frozen": ("vision", "projector")}
    trained = train(tiny_run(vision_ranks=1, training=training))
    changed = trained.changed(train(tiny_run(training=training), []))
    assert changed and not any(name.startswith("vision.") for name in changed)


def test_packed_documents_do_not_attend_to_each_other() -> None:
    together = text_rows(0)[:1]
    other = _with_other_first_document(together[0])
    assert not np.array_equal(other.token_ids, together[0].token_ids)
    losses = [
        train(tiny_run(training={"rows_per_step": 1}), [[_only_last_document_counts(row)]])
        .metrics[0]
        .loss
        for row in (together[0], other)
    ]
    assert losses[0] == losses[1]


def test_a_step_with_an_infinite_gradient_changes_no_weight() -> None:
    run = tiny_run(vision_ranks=1, training={"indexer_loss_weight": 1e300})
    trained = train(run, _one_step())
    assert not trained.metrics[0].was_applied
    assert not trained.changed(train(run, []))


def _one_step() -> list[list[PackedRow]]:
    return [mixed_rows(0)]


def _with_other_first_document(row: PackedRow) -> PackedRow:
    token_ids = row.token_ids.copy()
    end = row.document_bounds[1]
    token_ids[:end] = (token_ids[:end] + 7) % 90
    return replace(row, token_ids=token_ids)


def _only_last_document_counts(row: PackedRow) -> PackedRow:
    labels = row.labels.copy()
    labels[: row.document_bounds[1]] = -100
    return replace(row, labels=labels)


def test_the_indexer_learns_from_rows_without_any_label() -> None:
    row = text_rows(0)[0]
    unlabelled = [replace(row, labels=np.full_like(row.labels, -100))]
    training = {"optimizer": PLAIN, "phase": "indexer_warmup", "rows_per_step": 1}
    trained = train(tiny_run(training=training), [unlabelled])
    assert trained.changed(train(tiny_run(training=training), []))


def _weighted(rows: list[PackedRow]) -> list[PackedRow]:
    """Return the rows with another weight on each label."""
    generator = np.random.default_rng(3)
    return [
        replace(row, weights=generator.uniform(0.1, 2, len(row.weights)).astype("f4"))
        for row in rows
    ]


def test_the_loss_is_the_mean_by_weight_and_its_scale_changes_nothing() -> None:
    rows = text_rows(0)[:2]
    run = tiny_run(training={"optimizer": PLAIN, "rows_per_step": 2})
    unlabelled = [replace(row, labels=np.full_like(row.labels, -100)) for row in rows]
    alone = [
        train(run, [[rows[0], unlabelled[1]]]).metrics[0].loss,
        train(run, [[unlabelled[0], rows[1]]]).metrics[0].loss,
    ]
    shares = [row.num_loss_tokens * weight for row, weight in zip(rows, (0.5, 3.0), strict=True)]

    def by_row(*weights: float) -> Trained:
        weighted = [
            replace(row, weights=np.full_like(row.weights, weight))
            for row, weight in zip(rows, weights, strict=True)
        ]
        return train(run, [weighted])

    together, quadrupled = by_row(0.5, 3.0), by_row(2.0, 12.0)
    assert together.metrics[0].loss == pytest.approx(np.average(alone, weights=shares), rel=1e-6)
    # Powers of two only move exponents; the indexer's and the balancing loss keep their parts.
    assert not together.changed(quadrupled)
    assert together.metrics[0].gradient_norm == quadrupled.metrics[0].gradient_norm
    assert together.metrics[0].indexer_kl == quadrupled.metrics[0].indexer_kl


def test_weights_are_those_of_one_rank_on_every_grid() -> None:
    batches = [_weighted(mixed_rows(step)) for step in range(2)]
    expected = train(tiny_run(), batches)
    assert_same_training(train(tiny_run(context=2, data=2), batches), expected)
    assert expected.metrics[0].loss != train(tiny_run(), [mixed_rows(0)]).metrics[0].loss
