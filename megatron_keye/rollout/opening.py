# SPDX-License-Identifier: Apache-2.0
"""Builds an engine on this rank from a checkpoint of any training grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_keye.checkpoint.history import read_history
from megatron_keye.checkpoint.training_checkpoint import read_weights
from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.errors import UserError
from megatron_keye.model import build_model
from megatron_keye.parallel.grid import build_grid
from megatron_keye.parallel.process import Process
from megatron_keye.parallel.random import seed_rank
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.training.hand_over import attention_of
from megatron_keye.training.patch_source import open_patch_source


@contextmanager
def open_engine(
    run: RunConfig,
    process: Process,
    weights: Path,
    *,
    uses_transformer_engine: bool,
    fusions: Fusions = PLAIN,
) -> Iterator[EmbeddedEngine]:
    """Build an engine with the weights of a checkpoint. Collective: all ranks must call it.

    Args:
        run: A run whose grid generates (`rollout.grid.generating_run`).
        process: This rank.
        weights: A complete checkpoint that training or a conversion wrote, on any grid.
        uses_transformer_engine: Whether linear layers are Transformer Engine's.
        fusions: The fused kernels that run.

    Raises:
        UserError: When the checkpoint is incomplete, of another model, or trained for another
            attention than the run's.
    """
    check_attention(run, weights)
    heartbeat = process.heartbeat
    heartbeat.note("build")
    grid = build_grid(run.parallel)
    seed_rank(run.training.seed, grid)
    model = build_model(
        run,
        grid,
        process.device,
        uses_transformer_engine=uses_transformer_engine,
        fusions=fusions,
        learns=False,
    )
    heartbeat.note("load")
    read_weights(weights, run, model, grid)
    source = open_patch_source(run, model, process.device, node_cache().probe)
    try:
        yield EmbeddedEngine(
            run, grid, model, source=source, device=process.device, heartbeat=heartbeat
        )
    finally:
        if source is not None:
            source.close()


def check_attention(run: RunConfig, weights: Path) -> None:
    """Raise a UserError if the run attends otherwise than the runs that trained the weights.

    Weights without a history pass; training.checks_hand_over=false lets all others pass.
    """
    history = read_history(weights)
    if not run.training.checks_hand_over or history is None:
        return
    attention, phase = attention_of(history), run.training.phase
    wanted = {"dense": "dense", "warmed up": phase, "sparse": "sparse"}[attention]
    if (phase == "sparse") != (wanted == "sparse"):
        raise UserError(
            f"training.phase: got {phase!r} with weights that were trained for {attention} "
            f"attention, expected {wanted!r}; set it, or training.checks_hand_over=false"
        )
