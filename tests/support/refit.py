# SPDX-License-Identifier: Apache-2.0
"""Compares weights that went to the ranks that generate with those of a checkpoint."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.state import shards_of, weight_state
from megatron_keye.checkpoint.training_checkpoint import read_weights
from megatron_keye.config import RunConfig
from megatron_keye.config.fused_kernels import PLAIN
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.process import Process
from megatron_keye.rollout import refit
from megatron_keye.rollout.generating_model import open_generating_model
from tests.support.train import build_step, let_go

NO_STORE: Any = None


def weights_of(model: KeyeModel, grid: Grid) -> dict[tuple[str, Any], Tensor]:
    """Return a copy of each part of the whole model that this rank has."""
    shards = shards_of(weight_state(model, grid))
    return {(s.key, s.global_offset): s.data.detach().clone() for s in shards}  # type: ignore[union-attr]


@torch.no_grad()
def _change_weights(model: KeyeModel) -> None:
    for module in model.wrapped():
        for weight in module.parameters():
            weight.mul_(-1.5)


def bring(run_json: str, folder: str) -> tuple[bool, int, int, int]:
    """Change all weights, and compare the weights that generate with those of a checkpoint.

    Returns:
        Whether all are equal before and after a sleep, the bytes that travelled, and those of the
        weights' own memory while the model sleeps and while it generates.
    """
    run = replace(RunConfig.from_json(run_json), output_dir=folder)
    device = torch.device("cpu" if run.device == "cpu" else torch.cuda.current_device())
    grid, learning, optimizer, _ = build_step(run)
    process = Process(
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        device=device,
        store=NO_STORE,
    )
    refit._ROUND_BYTES, usual = 3000, refit._ROUND_BYTES
    opened = open_generating_model(
        run, process, grid, learning, uses_transformer_engine=False, fusions=PLAIN
    )
    assert opened.refit is not None
    opened.refit.renew()
    _change_weights(learning)
    progress = training_checkpoint.Progress(step=1, updates=1, data={})
    saved = training_checkpoint.save(run, learning, optimizer, grid, progress)
    # Another seed, so that weights that are not read differ.
    other = replace(opened.run, training=replace(opened.run.training, seed=9))
    expected = build_model(
        other, opened.grid, process.device, uses_transformer_engine=False, learns=False
    )
    read_weights(saved, other, expected, opened.grid)
    wanted = weights_of(expected, opened.grid)
    opened.refit.note_update()
    are_equal, sizes = [], []
    for _ in range(2):
        opened.refit.renew()
        got = weights_of(opened.model, opened.grid)
        assert got.keys() == wanted.keys()
        are_equal += [torch.equal(got[key], wanted[key]) for key in wanted]
        sizes.append(sum(storage.nbytes() for storage, _ in opened.refit._memory))
        opened.refit.release()
        sizes.append(sum(storage.nbytes() for storage, _ in opened.refit._memory))
    refit._ROUND_BYTES = usual
    for model in (learning, expected, replace(opened.model, vision=None)):
        let_go(model)
    assert sizes[0] == sizes[2] and sizes[1] == sizes[3]
    return all(are_equal), opened.refit.num_bytes, sizes[1], sizes[0]
