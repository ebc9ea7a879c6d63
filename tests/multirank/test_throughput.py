"""The FLOPs that MFU counts are those of a real step, as counted by torch."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_keye.config import RunConfig
from megatron_keye.config.lora import LoraConfig
from megatron_keye.training.throughput import peak_tflops, step_flops
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import build_step, let_go, train

LAYERS, WIDTH, HEADS = 4, 32, 8 * 16
INDEXER = 4 * 8
TOP_K = 12
FROZEN = ("vision", "projector", "decoder")


def _grouped(left: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count the FLOPs of a grouped product of rows by stacked weights, or of rows by rows."""
    return 2 * left[0] * left[1] * right[-1]


def _matrix_products(run_json: str) -> int:
    """Count the FLOPs of products with weights in a step of one row; those of pairs use bmm."""
    _, model, _, step = build_step(RunConfig.from_json(run_json))
    products = torch.ops.aten.mm, torch.ops.aten._grouped_mm
    with FlopCounterMode(display=False, custom_mapping={products[1]: _grouped}) as counter:
        step([mixed_rows(0)[1]], 0)
    let_go(model)
    return sum(int(counter.get_flop_counts()["Global"][product]) for product in products)


def _pair_products(phase: str, *, passes_gradients: bool) -> float:
    """Count the FLOPs of (query, key) pairs in documents of 20, 9 and 35 tokens."""
    pairs = [np.arange(1, length + 1) for length in (20, 9, 35)]
    scored = sum(each.sum() for each in pairs)
    selected = sum(np.minimum(each, TOP_K).sum() for each in pairs)
    attended = selected if phase == "sparse" else scored
    attention = 4 * HEADS * attended * (3 if passes_gradients else 1)
    indexer = 0 if phase == "dense" else 2 * INDEXER * (scored + 2 * attended)
    return float(LAYERS * (attention + indexer))


@pytest.mark.parametrize(
    ("phase", "frozen"),
    [("dense", ()), ("sparse", ()), ("indexer_warmup", ()), ("sparse", FROZEN)],
)
def test_every_product_with_a_weight_is_counted(phase: str, frozen: tuple[str, ...]) -> None:
    run = tiny_run(training={"phase": phase, "frozen": frozen})
    only_indexers = run.training.only_indexers_learn
    row = mixed_rows(0)[1]
    expected = step_flops([row], run) - _pair_products(phase, passes_gradients=not only_indexers)
    if only_indexers:
        # The backward pass starts at the language loss, though nothing is trained by it.
        expected += 2 * WIDTH * run.model.decoder.vocab_size * row.num_loss_tokens
    (counted,) = run_on_ranks(1, _matrix_products, run.to_json())
    assert counted == expected


def test_padding_has_no_flops() -> None:
    run, row = tiny_run(), mixed_rows(0)[3]
    assert row.num_real_tokens == 30
    bounds = row.document_bounds
    whole = replace(
        row, token_ids=row.token_ids[:30], labels=row.labels[:30], document_bounds=bounds[:2]
    )
    assert step_flops([row], run) == step_flops([whole], run) > 0


def test_weights_beside_adapters_count_as_frozen_ones() -> None:
    row, lora = mixed_rows(0)[1], LoraConfig(rank=2)
    frozen = step_flops([row], tiny_run(training={"frozen": ("decoder",)}))
    assert step_flops([row], tiny_run(training={"lora": lora})) == frozen


def test_vision_flops_depend_on_trained_parts() -> None:
    row = mixed_rows(0)[0]
    without = replace(row, pictures=(), picture_starts=())

    def vision(*frozen: str) -> float:
        run = tiny_run(training={"frozen": frozen})
        return step_flops([row], run) - step_flops([without], run)

    patches, size, merged = 60, 16, 4 * 16
    projector = 2 * merged * (merged + WIDTH) * patches / 4
    matrices = 2 * (4 * size**2 + 2 * size * 24)
    encoder = patches * (2 * matrices + 2 * 3 * 4**2 * size)
    encoder += 2 * 4 * size * sum(count**2 for count in (24, 24, 8, 4))
    assert vision() == 3 * (encoder + projector)
    assert vision("vision") == encoder + 2 * projector
    assert vision("projector") == 3 * encoder + 2 * projector
    assert vision("vision", "projector") == encoder + projector
    cached = tiny_run(training={"frozen": ("vision",)})
    cached = replace(cached, data=replace(cached.data, feature_cache="runs/features"))
    assert step_flops([row], cached) - step_flops([without], cached) == 2 * projector


def test_peaks_are_known_by_name_and_precision() -> None:
    run = tiny_run(training={"precision": "bf16"})
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200": 989.4,
        "NVIDIA H20": 148.0,
        "NVIDIA H20-3e": 148.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
    }.items():
        assert peak_tflops(run, name) == peak
    assert math.isnan(peak_tflops(run, "NVIDIA H2000"))
    assert math.isnan(peak_tflops(run, "CPU"))
    assert math.isnan(peak_tflops(tiny_run(), "NVIDIA H200"))
    configured = tiny_run(training={"device_peak_tflops": 5.0})
    assert peak_tflops(configured, "CPU") == 5.0


def test_a_step_reports_its_rate_per_rank() -> None:
    run = tiny_run(data=2, training={"device_peak_tflops": 2.0})
    rows = mixed_rows(0)
    (metrics,) = train(run, [rows]).metrics
    rate = step_flops(rows, run) / metrics.step_seconds / 2 / 1e12
    assert metrics.tflops_per_device == pytest.approx(rate)
    assert metrics.mfu == pytest.approx(rate / 2.0)
