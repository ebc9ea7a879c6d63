# SPDX-License-Identifier: Apache-2.0
"""The account's FLOPs are those of a real step, product by product, as torch counts them.

A product is known by its three sizes: those of a weight and the rows that meet it, whichever of
forward, gradient of the input and gradient of the weight it is.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_keye.config import RunConfig
from megatron_keye.config.lora import LoraConfig
from megatron_keye.config.parallel import VisionRecompute
from megatron_keye.estimate.account import Module, Work
from megatron_keye.estimate.account.counts import Extent, RowCounts
from megatron_keye.estimate.account.decoder import layer_works, output_works
from megatron_keye.estimate.account.vision import count_patches, vision_works
from megatron_keye.kernels import row_chunks
from megatron_keye.plan.slots import vision_learns
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import build_step, let_go

TOKENS, TOP_K, LABELS, PATCHES, RANK = 64, 12, 11, 60, 12
MATRICES: dict[Module, list[tuple[int, int, int]]] = {
    "vision.linear": [(PATCHES, 48, 16), (PATCHES, 16, 16), (PATCHES, 16, 24)],
    "projector": [(PATCHES // 4, 64, 64), (PATCHES // 4, 64, 32)],
    "decoder.attention.projections": [(TOKENS, 32, 256), (TOKENS, 128, 32)],
    "decoder.indexer.projections": [(TOKENS, 32, 36), (TOKENS, 32, 8)],
    "decoder.router": [(TOKENS, 32, 4)],
    "decoder.experts": [(2 * TOKENS, 32, 48), (2 * TOKENS, 24, 32)],
    "vocabulary": [(LABELS, 32, 96)],
}
"""Rows, inputs and outputs of each weight that the row of the test meets."""
ADAPTERS: dict[Module, list[tuple[int, int, int]]] = {
    "vision.linear": [(PATCHES, 16, RANK), (PATCHES, 24, RANK)],
    "projector": [(PATCHES // 4, 64, RANK), (PATCHES // 4, 32, RANK)],
    "decoder.attention.projections": [
        (TOKENS, 32, RANK),
        (TOKENS, 256, RANK),
        (TOKENS, 128, RANK),
    ],
    "decoder.experts": [(2 * TOKENS, size, RANK) for size in (32, 48, 24)],
}
ALL_TARGETS = LoraConfig(rank=RANK, targets=("attention", "experts", "projector", "vision"))
ONLY_INDEXERS = ("vision", "projector", "decoder")


def _count_products(run_json: str) -> dict[tuple[int, ...] | str, int]:
    """Count the FLOPs of a step of one row by the sizes of their products, of pairs as "pairs"."""
    counted: Counter[tuple[int, ...] | str] = Counter()

    def product(left: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
        sizes = (*left, right[-1])
        flops = 2 * left[0] * left[1] * right[-1]
        counted[tuple(sorted(sizes))] += flops
        return flops

    def biased(_: Any, left: tuple[int, ...], right: tuple[int, ...], *__: Any, **___: Any) -> int:
        return product(left, right)

    def batched(left: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
        flops = 2 * left[0] * left[1] * left[2] * right[-1]
        # Weighted sums over heads, which kernels do in registers, are no products of matrices.
        is_sum = 1 in (left[1], left[2], right[2])
        counted["sums" if is_sum else "pairs"] += flops
        return flops

    def called(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        """Stand for the checkpoint by which eager operators save memory, and repeat themselves."""
        return function(*arguments)

    aten = torch.ops.aten
    mapping: dict[Any, Any] = {aten.mm: product, aten._grouped_mm: product, aten.addmm: biased}
    mapping[aten.bmm] = batched
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    with (
        sdpa_kernel(SDPBackend.MATH),
        patch.object(row_chunks, "checkpoint", called),
        FlopCounterMode(display=False, custom_mapping=mapping),
    ):
        step([mixed_rows(0)[0]], 0)
    let_go(model)
    return dict(counted)


def _works(run: RunConfig) -> dict[Module, Work]:
    """Return the account of that step, with pairs as eager operators lay them out."""
    phase = run.training.phase
    extent = Extent(
        num_tokens=TOKENS,
        attended=TOKENS * (TOP_K if phase == "sparse" else TOKENS),
        scored=TOKENS * TOKENS,
    )
    counts = RowCounts(
        phase=phase,
        num_rows=1,
        real=extent,
        laid=extent,
        num_keys=TOKENS,
        num_labels=LABELS,
        num_measured=16 * TOKENS if phase == "sparse" else 0,
    )
    works = [work * run.model.decoder.num_layers for work in layer_works(run, [counts])]
    works += output_works(run, [counts])
    works += vision_works(run, count_patches([24, 24, 8, 4], run))
    return {work.module: work for work in works}


def _pair_flops(run: RunConfig, works: dict[Module, Work]) -> float:
    """Return the FLOPs over pairs that eager operators do once, and again in repeated passes."""
    once = {module: work.model_flops for module, work in works.items()}
    is_repeated = run.training.recompute in ("selective", "full")
    encodes_again = run.parallel.vision.recompute == "on" and vision_learns(run)
    flops = once["vision.attention"].total + encodes_again * once["vision.attention"].forward
    for module in ("decoder.attention.selected", "decoder.attention.dense"):
        if module in once:
            flops += once[module].total + is_repeated * once[module].forward
    decoder = run.model.decoder
    layers = decoder.num_layers
    if run.training.phase == "sparse":
        flops += works["decoder.indexer.scores"].executed_flops.total
        flops += works["decoder.indexer.recall"].executed_flops.total
        selected = 2 * decoder.indexer.num_heads * decoder.indexer.head_dim * TOKENS * TOP_K
        flops += once["decoder.indexer.loss"].total + layers * selected
    elif run.training.phase == "indexer_warmup":
        logits = 2 * decoder.num_heads * decoder.head_dim * TOKENS * TOKENS
        flops += once["decoder.indexer.loss"].total + layers * logits
    return flops


QUICK: list[tuple[dict[str, object], VisionRecompute]] = [
    ({}, "on"),
    ({"recompute": "full", "frozen": ("decoder",)}, "on"),
    ({"phase": "indexer_warmup", "recompute": "selective"}, "on"),
    ({"lora": ALL_TARGETS, "recompute": "selective"}, "on"),
]
SLOW: list[tuple[dict[str, object], VisionRecompute]] = [
    ({"recompute": "experts"}, "off"),
    ({"recompute": "selective"}, "off"),
    ({"phase": "dense", "recompute": "full"}, "off"),
    ({"phase": "indexer_warmup"}, "on"),
    ({"frozen": ONLY_INDEXERS, "recompute": "experts"}, "on"),
    ({"frozen": ONLY_INDEXERS, "recompute": "selective"}, "on"),
    ({"frozen": ("vision", "indexer")}, "on"),
    ({"frozen": ("projector",)}, "on"),
    ({"lora": LoraConfig(rank=RANK, targets=("projector",))}, "off"),
]


@pytest.mark.parametrize(
    ("training", "vision_recompute"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
    ids=str,
)
def test_every_product_of_a_step_is_counted(
    training: dict[str, object], vision_recompute: VisionRecompute
) -> None:
    run = tiny_run(training=training | {"rows_per_step": 1}, chunk_patches=PATCHES)
    parallel = replace(
        run.parallel, vision=replace(run.parallel.vision, recompute=vision_recompute)
    )
    run = replace(run, parallel=parallel)
    (counted,) = run_on_ranks(1, _count_products, run.to_json())
    works = _works(run)
    assert counted.pop("pairs") == _pair_flops(run, works)
    counted.pop("sums", None)
    for module, sizes in MATRICES.items():
        own = {tuple(sorted(each)) for each in sizes + ADAPTERS.get(module, [])}
        flops = sum(counted.pop(each, 0) for each in own)
        expected = works[module].executed_flops.total if module in works else 0
        assert flops == expected, module
    assert not counted, "products that the account does not know"
