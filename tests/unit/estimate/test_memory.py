# SPDX-License-Identifier: Apache-2.0
"""Estimated memory agrees with measurements on GPUs, and follows sizes and degrees."""

from dataclasses import replace

import pytest

from megatron_keye.config import RunConfig
from megatron_keye.estimate.kept_patches import affordable_patches
from megatron_keye.estimate.memory import (
    Memory,
    decoder_memory,
    patch_bytes,
    vision_memory,
)
from megatron_keye.estimate.parameters import decoder_parameters, vision_parameters
from megatron_keye.estimate.state import host_bytes
from megatron_keye.recipes import load_recipe

MEBIBYTE = 2**20
COLOCATED = [
    "parallel.vision.placement=colocated",
    "parallel.vision.num_ranks=0",
    "parallel.decoder.context=2",
    "parallel.decoder.expert=2",
]
UNSHARED = "training.optimizer.distributed=false"


def two_gpus(*settings: str) -> RunConfig:
    return load_recipe("keye_two_gpus")(num_ranks=2, has_gpu=True).with_overrides(list(settings))


def full_size(*settings: str) -> RunConfig:
    return load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True).with_overrides(list(settings))


def of_decoder(run: RunConfig, stage: int = 0, num_labels: int = 0) -> Memory:
    held = decoder_parameters(run, stage)
    if run.parallel.vision.decoder_encodes:
        held += vision_parameters(run)
    patches = run.data.row_tokens * run.model.vision.merge_size**2
    return decoder_memory(run, stage, held, num_labels=num_labels, num_patches=patches)


@pytest.mark.parametrize(
    ("thousands", "recompute", "fusions", "measured"),
    [
        (8, "none", "auto", 25_279),
        (8, "none", "off", 25_998),
        (32, "none", "auto", 36_473),
        (32, "none", "off", 39_341),
        (32, "experts", "auto", 34_405),
        (32, "selective", "auto", 31_487),
        (32, "full", "auto", 31_244),
        (128, "selective", "auto", 60_659),
        (128, "selective", "off", 66_310),
        (128, "full", "auto", 59_683),
    ],
)
def test_two_layers_memory_agrees_with_an_h100(
    thousands: int, recompute: str, fusions: str, measured: int
) -> None:
    """Peaks in MiB of two full-width layers with Transformer Engine (`tools/benchmark_step.py`).

    Commit 0a215bc, which kept the target of each layer and whose state took 21,548 MiB.
    """
    names = "swiglu", "norm"
    run = two_gpus(
        "model.decoder.num_layers=2",
        f"data.row_tokens={thousands * 1024}",
        f"training.recompute={recompute}",
        "training.expert_layers=transformer_engine",
        *(f"training.fusions.{name}={fusions}" for name in names),
    )
    memory = of_decoder(run)
    num_targets = 2 if recompute in ("none", "experts") else 1
    expected = memory.activations + memory.workspace + num_targets * of_target(run)
    assert 21_548 + expected / MEBIBYTE == pytest.approx(measured, rel=0.03)


def of_target(run: RunConfig) -> int:
    """Return the bytes of a float32 for each key-value head and selected key of a row."""
    decoder = run.model.decoder
    tokens = run.data.row_tokens // run.parallel.decoder.context
    return tokens * decoder.indexer.top_k * 4 * decoder.num_kv_heads


def test_each_choice_of_recomputation_keeps_what_it_says() -> None:
    """MiB of activations of one full-width layer and 32K tokens, added up by hand."""
    run = two_gpus()
    tokens, layers = run.data.row_tokens, run.model.decoder.num_layers
    kept = {
        choice: of_decoder(two_gpus(f"training.recompute={choice}")).activations / tokens / layers
        for choice in ("none", "experts", "selective", "full")
    }
    # Of 8 experts the input, gate, value and product, in bf16.
    assert kept["none"] - kept["experts"] == 2 * 8 * (2048 + 3 * 768)
    # The attention's output in bf16 and a float32 of each of its 32 heads.
    assert kept["selective"] - kept["full"] == 32 * (2 * 128 + 4)
    away = two_gpus("training.recompute=selective", "training.keeps_in_host_memory=true")
    assert of_decoder(away).activations / tokens / layers == 2 * 2048, "the layer's input"
    # The layer's input, and 2048 keys of two bytes with one end of a block.
    assert kept["full"] == 2 * 2048 + 2 * 2048 + 4


@pytest.mark.parametrize(
    ("settings", "decoder", "vision"),
    [
        ((), 85_578, 16_940),
        ([*COLOCATED, UNSHARED], 58_069, None),
        (COLOCATED, 51_357, None),
    ],
)
def test_a_runs_memory_agrees_with_two_h200(
    settings: list[str], decoder: int, vision: int | None
) -> None:
    """Peaks in MiB of keye_two_gpus, the second one of commit 9f4363e, the others of b4f55dc.

    They had no fused kernels, experts apart, and kept the target of each of the four layers.
    """
    plain = ["training.fusions.swiglu=off", "training.fusions.norm=off"]
    run = two_gpus(*settings, *plain, "training.expert_layers=transformer_engine")
    expected = of_decoder(run, num_labels=100).total + 4 * of_target(run)
    assert expected / MEBIBYTE == pytest.approx(decoder, rel=0.03)
    if vision is not None:
        patches = run.data.row_tokens * run.model.vision.merge_size**2
        memory = vision_memory(run, vision_parameters(run), num_patches=patches)
        assert memory.total / MEBIBYTE == pytest.approx(vision, rel=0.03)


def test_a_distributed_optimizer_is_divided_by_the_replicas() -> None:
    shared, alone = of_decoder(full_size()), of_decoder(full_size(UNSHARED))
    assert replace(shared, optimizer=0.0) == replace(alone, optimizer=0.0)
    # Experts, most of all, are shared by 2 x 8 / 8 ranks, the rest by 8 or more.
    assert 0.25 < shared.optimizer / alone.optimizer < 0.4


def test_frozen_parts_need_memory_for_weights_alone() -> None:
    run = full_size("training.frozen=vision,projector,decoder")
    memory, learning = of_decoder(run), of_decoder(full_size())
    assert memory.weights == learning.weights
    assert memory.gradients < 0.02 * learning.gradients
    assert memory.optimizer < 0.02 * learning.optimizer


def test_earlier_stages_hold_more_micro_batches() -> None:
    kept = ["training.recompute=none"]
    held = [of_decoder(full_size(*kept), stage).activations for stage in range(4)]
    assert held == pytest.approx([held[3] * times for times in (4, 3, 2, 1)])
    few = full_size(*kept, "training.rows_per_step=2")
    assert of_decoder(few).activations == pytest.approx(2 * held[3])
    interleaved = full_size(*kept, "parallel.decoder.virtual_stages=6")
    # 2 x 3 + 5 x 4 + 1 virtual stages of 2 layers, instead of 12 layers 4 times.
    assert of_decoder(interleaved).activations == pytest.approx(held[0] * 27 * 2 / 48)


def test_labels_make_logits_on_the_last_stage() -> None:
    run = full_size()
    few, many = (of_decoder(run, 3, num_labels=number) for number in (0, run.data.row_tokens))
    assert many.workspace > few.workspace
    assert many.workspace == pytest.approx(run.data.row_tokens / 8 * 151_936 / 2 * 10)
    assert of_decoder(run, 0, num_labels=run.data.row_tokens).workspace == few.workspace


def test_phases_keep_what_they_need() -> None:
    whole = ["training.recompute=none"]
    sparse, dense, warm_up = (
        of_decoder(full_size(*whole, f"training.phase={phase}")).activations
        for phase in ("sparse", "dense", "indexer_warmup")
    )
    assert warm_up < 0.2 * dense < 0.2 * sparse


def test_kept_activations_of_vision_count_beside_the_decoders() -> None:
    """A row's 131,072 patches times six rows, in bytes of an encoder layer's tensors."""
    again, kept = (
        of_decoder(two_gpus(*COLOCATED, f"parallel.vision.recompute={choice}"))
        for choice in ("on", "off")
    )
    run = two_gpus(*COLOCATED)
    assert of_decoder(run) == again, "auto takes what is left"
    of_patch = 27 * 2 * (9 * 1152 + 2 * 4304)
    assert patch_bytes(run) == of_patch
    chunk = run.parallel.vision.chunk_patches
    expected = (131_072 * 6 // 2 - chunk) * of_patch
    assert kept.activations - again.activations == pytest.approx(expected)
    again, kept = (
        two_gpus("parallel.vision.shared_micro_batches=1", f"parallel.vision.recompute={choice}")
        for choice in ("on", "off")
    )
    chunks = of_decoder(kept).activations - of_decoder(again).activations
    assert chunks == pytest.approx((131_072 * 2 - kept.parallel.vision.chunk_patches) * of_patch)
    held = vision_parameters(kept)
    chunks = vision_memory(kept, held, num_patches=131_072).activations
    assert chunks == pytest.approx(131_072 * 4 * of_patch)
    frozen = two_gpus("parallel.vision.recompute=off", "training.frozen=vision,projector")
    patches, held = 131_072, vision_parameters(frozen)
    memory = vision_memory(frozen, held, num_patches=patches)
    free = frozen.with_overrides(["parallel.vision.recompute=on"])
    assert memory == vision_memory(free, held, num_patches=patches)


def test_activations_are_kept_as_far_as_a_gpu_has_room() -> None:
    run = two_gpus()
    needed = vision_memory(run, vision_parameters(run), num_patches=131_072).total
    room = [affordable_patches(run, 1, gibibytes * 2**30) for gibibytes in (16, 80, 140)]
    assert room[0] == 0 < room[1] < room[2]
    assert (room[2] - room[1]) * patch_bytes(run) == pytest.approx(60 * 2**30, rel=1e-4)
    assert 1.05 * needed + room[1] * patch_bytes(run) <= 72 * 2**30
    off = run.with_overrides(["parallel.vision.recompute=off"])
    assert affordable_patches(off, 1, 80 * 2**30) == room[1], "the setting itself does not count"


def test_adapters_and_indexers_alone_have_gradients_and_moments() -> None:
    run = full_size("training.lora.rank=16", UNSHARED)
    held = [*decoder_parameters(run, 0), *vision_parameters(run)]
    learning = sum(each.count for each in held if each.is_adapter or each.part == "indexer")
    memory = decoder_memory(run, 0, held, num_labels=0, num_patches=0)
    assert 0 < learning < sum(each.count for each in held) / 50
    assert (memory.gradients, memory.optimizer) == (4 * learning, 12 * learning)
    assert memory.weights == 2 * sum(each.count for each in held)


def test_state_in_main_memory_leaves_the_device_and_rounded_moments_halve() -> None:
    run = full_size()
    held = [*decoder_parameters(run, 0), *vision_parameters(run)]
    away = full_size("training.optimizer.offload=0.75")
    rounded = full_size("training.optimizer.offload=1", "training.optimizer.moments=bf16")
    whole = of_decoder(run).optimizer
    assert host_bytes(run, held) == 0
    assert of_decoder(away).optimizer == pytest.approx(whole / 4)
    assert host_bytes(away, held) == pytest.approx(whole * 3 / 4)
    # Moments of 2 and a master of 4 bytes, of 12 in all.
    assert host_bytes(rounded, held) == pytest.approx(whole * 8 / 12)


def test_weights_are_there_twice_while_the_model_is_built() -> None:
    """Of one rank without state on the device: more than a short row's activations take."""
    settings = ["parallel.decoder.pipeline=1", "parallel.decoder.tensor=1", "data.row_tokens=1024"]
    run = full_size(*settings, "training.optimizer.offload=1", "training.frozen=vision,projector")
    held = [*decoder_parameters(run, 0), *vision_parameters(run)]
    experts = 2 * sum(each.count for each in held if each.is_expert)
    memory = of_decoder(run)
    assert memory.activations + memory.workspace == pytest.approx(experts)
