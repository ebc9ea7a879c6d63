# SPDX-License-Identifier: Apache-2.0
"""The account: shares of ranks sum to the whole, and formulas are those of others and of hands."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_keye.config import DecoderConfig, DecoderParallel, ParallelConfig, RunConfig
from megatron_keye.estimate.account import (
    Module,
    Work,
    job_works,
    model_flops,
    pass_works,
    picture_works,
    rank_works,
    row_works,
    total_executed_flops,
    total_model_flops,
)
from megatron_keye.estimate.parameters import decoder_parameters, vision_parameters
from megatron_keye.plan.places import decoder_place
from megatron_keye.plan.slots import RowSizes
from megatron_keye.recipes import load_recipe
from tests.support.tiny import mixed_rows, tiny_run

GRID = {"tensor": 2, "context": 2, "data": 2, "pipeline": 2, "expert": 2}
PHASES = ("dense", "indexer_warmup", "sparse")
ROWS = [row.sizes for row in mixed_rows(0)]


def by_module(works: list[Work]) -> dict[Module, Work]:
    return {work.module: work for work in works}


def full_size(**training: object) -> RunConfig:
    run = load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True)
    parallel = ParallelConfig(decoder=DecoderParallel(data=8, expert=8))
    return replace(run, parallel=parallel, training=replace(run.training, **training))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("vision_ranks", "shared"), [(0, 0), (3, 0), (3, 1)])
def test_ranks_work_together_as_much_as_the_job(
    phase: str, vision_ranks: int, shared: int
) -> None:
    run = tiny_run(
        training={"phase": phase}, vision_ranks=vision_ranks, shared_micro_batches=shared, **GRID
    )
    rows = [*ROWS, *ROWS]
    job = by_module(job_works(run, rows))
    ranks = [
        work for rank in range(run.parallel.num_ranks) for work in rank_works(run, rows, rank)
    ]
    for module, work in job.items():
        parts = [each for each in ranks if each.module == module]
        for kind in ("model_flops", "executed_flops"):
            whole = getattr(work, kind)
            for name in ("forward", "backward", "recomputed"):
                shares = sum(getattr(getattr(each, kind), name) for each in parts)
                assert shares == pytest.approx(getattr(whole, name)), (module, kind, name)
    alone = tiny_run(training={"phase": phase})
    assert model_flops(run, rows) == model_flops(alone, rows) == total_model_flops(job.values())


def test_passes_of_a_rank_are_its_step() -> None:
    run = tiny_run(virtual_stages=2, **GRID)
    for rank in (0, run.parallel.decoder.num_ranks - 1):
        place = decoder_place(run.parallel.decoder, rank)
        passes = [
            work
            for row in ROWS[place.data :: 2]
            for stage in range(2)
            for work in pass_works(run, row, place, stage)
        ]
        vision = sum(total_executed_flops(picture_works(run, row.patches)) for row in ROWS)
        whole = total_executed_flops(rank_works(run, ROWS, rank)) - vision / 16
        assert total_executed_flops(passes) == pytest.approx(whole)


def _megatron_flops(decoder: DecoderConfig, lengths: list[int]) -> float:
    """Return what Megatron-LM counts for a step with packed rows.

    Source: `num_floating_point_operations` in megatron/training/training.py of Megatron-LM, for
    grouped queries, gated experts in every layer and an output layer for every token: 3 passes of
    2 FLOPs a multiply-add; of L^2 pairs the causal half, without the diagonal's other half.
    """
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    query_width = decoder.num_heads * decoder.head_dim
    shared = decoder.num_kv_heads / decoder.num_heads
    linear = decoder.hidden_size * query_width * (1 + shared) * tokens * 2
    core = query_width * squares / 2 * 2
    routed = decoder.experts.num_experts_per_token * decoder.experts.intermediate_size
    experts = 3 * decoder.hidden_size * routed * tokens
    logits = decoder.hidden_size * decoder.vocab_size * tokens
    return 3.0 * 2 * (decoder.num_layers * (linear + core + experts) + logits)


def test_dense_rows_count_as_in_megatron_lm() -> None:
    run = full_size(phase="dense")
    decoder, lengths = run.model.decoder, [100_000, 24_000, 7072]
    row = RowSizes(lengths, [], num_labels=sum(lengths))
    works = by_module(job_works(run, [row]))
    # It counts neither the router nor that a query sees itself: half a pair for each.
    ours = total_model_flops(works.values()) - works["decoder.router"].model_flops.total
    halves = 12 * decoder.num_heads * decoder.head_dim * decoder.num_layers * sum(lengths) / 2
    assert ours - halves == pytest.approx(_megatron_flops(decoder, lengths), rel=1e-12)


def test_pairs_are_those_of_true_lengths() -> None:
    run = tiny_run(context=2)
    decoder, row = run.model.decoder, ROWS[3]
    queries = np.arange(1, 31)
    works = by_module(job_works(run, [row]))
    pairs = decoder.num_layers * np.minimum(queries, decoder.indexer.top_k).sum()
    selected = works["decoder.attention.selected"]
    assert selected.model_flops.forward == 4 * 8 * 16 * pairs
    padding = decoder.num_layers * np.minimum(np.arange(1, 35), decoder.indexer.top_k).sum()
    assert selected.executed_flops.forward == 4 * 8 * 16 * (pairs + padding)
    scores = works["decoder.indexer.scores"].model_flops
    assert scores.total == decoder.num_layers * 2 * 4 * 8 * queries.sum()


def test_shared_prompts_count_once() -> None:
    """Two answers of 8 tokens behind 24, against two rows with the prompt in each."""
    run = tiny_run(training={"phase": "dense"})
    branched = RowSizes([24, 8, 8], [], [0, 24, 24])
    apart = [RowSizes([32], []), RowSizes([32], [])]
    prompt = RowSizes([24], [])

    def attention(rows: list[RowSizes]) -> float:
        return by_module(job_works(run, rows))["decoder.attention.dense"].executed_flops.total

    assert attention([branched]) == attention(apart) - attention([prompt])


@pytest.mark.parametrize("recompute", ["none", "experts", "selective", "full"])
def test_what_is_recomputed_is_a_forward_pass_more(recompute: str) -> None:
    run = tiny_run(training={"recompute": recompute})
    layer = by_module(row_works(run, ROWS[0])[0])
    again = {
        "none": set(),
        "experts": {"decoder.router", "decoder.experts"},
        "selective": {
            *("decoder.router", "decoder.experts", "decoder.attention.projections"),
            *("decoder.indexer.projections", "decoder.norms"),
        },
    }
    again["full"] = again["selective"] | {"decoder.attention.selected"}
    for module, work in layer.items():
        in_kernels = {"decoder.attention.selected", "decoder.indexer.loss"}
        expected = module in again[recompute]
        assert work.moved_bytes.recomputed == expected * work.moved_bytes.forward, module
        if module not in in_kernels:
            assert work.executed_flops.recomputed == expected * work.executed_flops.forward
    attention = layer["decoder.attention.selected"].executed_flops
    # Half of it in the kernel, queries by keys.
    assert attention.recomputed == attention.forward * (0.5 + (recompute == "full"))


def test_projections_move_their_operands_once() -> None:
    """One full-width layer over 1,024 tokens in bf16, added up by hand."""
    works = by_module(row_works(full_size(recompute="none"), RowSizes([1024], []))[0])
    qkv, output = 2048 * 5120, 4096 * 2048
    rows = 1024 * (2048 + 5120) + 1024 * (4096 + 2048)
    moved = works["decoder.attention.projections"].moved_bytes
    assert moved.forward == 2 * (rows + qkv + output)
    # Gradients of the results once, weights and gradients of the inputs; inputs again for the
    # gradients of the weights, which are float32.
    inputs = 1024 * (2048 + 4096)
    assert moved.backward == 2 * (rows + qkv + output + inputs) + 4 * (qkv + output)


def test_selected_attention_moves_its_operands_once() -> None:
    works = by_module(row_works(full_size(recompute="none"), RowSizes([8192], []))[0])
    moved = works["decoder.attention.selected"].moved_bytes
    queries, keys = 2 * 8192 * 32 * 128, 2 * 8192 * 4 * 128
    selection_and_sums = 8192 * (4 * 2048 + 4 * 32)
    assert moved.forward == 2 * queries + 2 * keys + selection_and_sums
    assert moved.backward == 4 * queries + 4 * keys + selection_and_sums


def test_experts_read_no_more_weights_than_rows_meet() -> None:
    run = full_size(recompute="none")
    few, many = (
        by_module(row_works(run, RowSizes([tokens], []))[0])["decoder.experts"].moved_bytes.forward
        for tokens in (1, 1024)
    )
    of_expert, of_row = 3 * 2048 * 768, (2048 + 2 * 768) + (768 + 2048)
    held = 128 // run.parallel.decoder.expert
    assert few == 2 * 8 * (of_row + of_expert)
    assert many == 2 * (8 * 1024 * of_row + held * of_expert)


def test_a_feature_cache_leaves_the_projector_alone() -> None:
    run = tiny_run(training={"frozen": ("vision",)})
    cached = replace(run, data=replace(run.data, feature_cache="runs/features"))
    every: Any = by_module(picture_works(run, [24, 24]))
    assert by_module(picture_works(cached, [24, 24])) == {"projector": every["projector"]}


def test_an_update_moves_the_state_of_what_learns() -> None:
    """Of bf16 parameters 30 bytes each: gradient, master, moments, weight; and 4 to clear."""
    run = full_size().with_overrides(["training.optimizer.distributed=false"])
    works = by_module(rank_works(run, [], 0, []))
    held = decoder_parameters(run, 0) + vision_parameters(run)
    num_trained = sum(each.count for each in held)
    assert works["optimizer"].moved_bytes.total == 34 * num_trained
