# SPDX-License-Identifier: Apache-2.0
"""The settings beside degrees that trade time for memory, and whether a run then fits a GPU."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_keye.config.parallel import VisionRecompute
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import RECOMPUTE, Recompute
from megatron_keye.estimate.memory import INACCURACY, RESERVED_BYTES, decoder_memory, vision_memory
from megatron_keye.estimate.parameters import decoder_parameters, vision_parameters
from megatron_keye.estimate.state import host_bytes
from megatron_keye.plan.slots import vision_learns

_CHUNKS = (4_096, 8_192, 16_384)
"""Patches of a chunk whose times are known."""


def choices(run: RunConfig) -> Iterator[RunConfig]:
    """Yield a run with each choice of recomputation and of the ViT's chunks."""
    recomputes: tuple[Recompute, ...] = RECOMPUTE
    if run.training.only_indexers_learn:
        recomputes = (run.training.recompute,)
    again: tuple[VisionRecompute, ...] = ("on", "off") if vision_learns(run) else ("on",)
    for chunk in sorted({*_CHUNKS, run.parallel.vision.chunk_patches}):
        for recompute_vision in again:
            vision = replace(run.parallel.vision, chunk_patches=chunk, recompute=recompute_vision)
            parallel = replace(run.parallel, vision=vision)
            for recompute in recomputes:
                training = replace(run.training, recompute=recompute, keeps_in_host_memory=False)
                yield replace(run, parallel=parallel, training=training)


def optimizers(run: RunConfig) -> Iterator[RunConfig]:
    """Yield a run with other ways to keep the optimizer's state, the least change first."""
    optimizer = run.training.optimizer
    if not run.training.distributes_optimizer or run.training.precision == "fp64":
        return
    ways = [{"moments": "bf16"}, {"offload": 1.0}, {"moments": "bf16", "offload": 1.0}]
    for way in ways:
        changed = replace(optimizer, **way)  # type: ignore[arg-type]
        if changed != optimizer:
            yield replace(run, training=replace(run.training, optimizer=changed))


def least_memory(run: RunConfig) -> RunConfig:
    """Return a run with the choices of `choices` that need the least memory."""
    vision = replace(run.parallel.vision, chunk_patches=_CHUNKS[0], recompute="on")
    training = replace(run.training, recompute="full", keeps_in_host_memory=False)
    return replace(run, parallel=replace(run.parallel, vision=vision), training=training)


def least_time(run: RunConfig) -> RunConfig:
    """Return a run with the choices of `choices` that take the least time, fit or not."""
    vision = run.parallel.vision
    chunk = max(*_CHUNKS, vision.chunk_patches)
    vision = replace(vision, chunk_patches=chunk, recompute="off")
    training = replace(run.training, recompute="none", keeps_in_host_memory=False)
    return replace(run, parallel=replace(run.parallel, vision=vision), training=training)


def needed_bytes(run: RunConfig) -> float:
    """Return the expected memory of the fullest GPU, for rows full of video.

    The stages in between hold fewer layers' activations than the first and no logits.
    """
    degrees, of_vision = run.parallel.decoder, vision_parameters(run)
    patches = run.data.row_tokens * run.model.vision.merge_size**2
    labels = run.data.row_tokens // 64
    num_dedicated = run.parallel.vision.num_ranks
    needed = []
    for stage in {0, degrees.pipeline - 1}:
        held = decoder_parameters(run, stage) + ([] if num_dedicated else of_vision)
        memory = decoder_memory(run, stage, held, num_labels=labels, num_patches=patches)
        needed.append(memory.total)
    if num_dedicated:
        needed.append(vision_memory(run, of_vision, num_patches=patches).total)
    return max(needed)


def host_gibibytes(run: RunConfig) -> float:
    """Return the main memory of the fullest rank for the optimizer's state, in GiB."""
    of_vision = [] if run.parallel.vision.num_ranks else vision_parameters(run)
    stages = {0, run.parallel.decoder.pipeline - 1}
    held = [decoder_parameters(run, stage) + of_vision for stage in stages]
    return max(host_bytes(run, each) for each in held) / 2**30


def usable_bytes(device_bytes: float) -> float:
    """Return how much a run may be expected to need on a GPU of so much memory."""
    return (device_bytes - RESERVED_BYTES) / INACCURACY
