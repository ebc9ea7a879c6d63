# SPDX-License-Identifier: Apache-2.0
"""Generates with the tiny model on the ranks of a test, and trains on what came, to compare."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_keye.config import RunConfig
from megatron_keye.config.fused_kernels import PLAIN, Fusions
from megatron_keye.data.packing import pack
from megatron_keye.data.row import IGNORED_LABEL, Sample, labels_of
from megatron_keye.decoder.key_cache import LayerCache
from megatron_keye.decoder.row import RowMeter
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.random import seed_rank
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.rollout.grid import generating_run
from megatron_keye.rollout.request import Completion, Request
from megatron_keye.training.microbatch import cut_row
from tests.support.ranks import run_on_ranks
from tests.support.tiny import SyntheticPatches, packed_row, synthetic_patches
from tests.support.train import let_go


@dataclass
class SelectionMeter(RowMeter):
    """Keeps what the layers select."""

    selected: dict[int, list[Tensor]] = field(default_factory=dict)
    """By layer, [T, K] of each pass."""

    def record(self, name: str, layer_number: int, value: Tensor) -> None:
        """Keep the selections of one layer."""
        if name == "topk_indices":
            self.selected.setdefault(layer_number, []).append(value.detach().clone())


def prompt(seed: int, num_text: int, *patch_grids: tuple[int, int]) -> Sample:
    """Return a random prompt whose pictures come first."""
    row = packed_row(seed, (num_text, patch_grids))
    return replace(
        text_prompt(row.token_ids[: row.num_real_tokens]),
        name=f"prompt {seed}",
        pictures=row.pictures,
        picture_starts=row.picture_starts,
    )


def text_prompt(token_ids: NDArray[np.int64]) -> Sample:
    """Return a prompt of these tokens."""
    return Sample(
        name="text",
        token_ids=token_ids,
        labels=np.full(len(token_ids), IGNORED_LABEL),
        weights=np.zeros(len(token_ids), dtype=np.float32),
        pictures=(),
        picture_starts=(),
    )


def request(key: int, sample: Sample, **options: Any) -> Request:
    """Return a request whose answers end by their length, unless told otherwise."""
    defaults = {"max_new_tokens": 6, "stop_ids": (), "seed": 5}
    return Request(key=key, prompt=sample, **(defaults | options))


def generated(run: RunConfig, requests: Sequence[Request]) -> dict[tuple[int, int], Completion]:
    """Return all completions by key and answer, which every rank has alike."""
    ranks = run.parallel.num_ranks
    results = run_on_ranks(ranks, _generate, run.to_json(), requests, device=run.device)
    for other in results[1:]:
        assert other == results[0], "all ranks have the same completions"
    return {(c.key, c.answer): c for c in results[0]}


def build_engine(
    run: RunConfig,
    meter: RowMeter | None = None,
    fusions: Fusions = PLAIN,
    *,
    notes_routes: bool = False,
) -> tuple[EmbeddedEngine, Grid, KeyeModel]:
    """Build an engine on this rank; call `let_go` on the model at the end."""
    run = generating_run(run, run.parallel.num_ranks)
    device = torch.device("cpu" if run.device == "cpu" else torch.cuda.current_device())
    grid = build_grid(run.parallel)
    seed_rank(run.training.seed, grid)
    engine = run.training.linear_layers == "transformer_engine"
    model = build_model(
        run, grid, device, uses_transformer_engine=engine, fusions=fusions, learns=False
    )
    source = SyntheticPatches() if model.vision is not None else None
    return (
        EmbeddedEngine(
            run,
            grid,
            model,
            source=source,
            device=device,
            meter=meter,
            notes_routes=notes_routes,
        ),
        grid,
        model,
    )


def caches() -> list[LayerCache]:
    """Return all layers' caches of this process that hold memory."""
    return [each for each in gc.get_objects() if isinstance(each, LayerCache)]


def _generate(run_json: str, requests: Sequence[Request]) -> list[Completion]:
    engine, _, model = build_engine(RunConfig.from_json(run_json))
    completions = list(engine.generate(requests))
    assert engine.num_used_pages == 0, "all pages are free at the end"
    let_go(model)
    return completions


def training_log_probs(
    run: RunConfig, grid: Grid, model: KeyeModel, sample: Sample, answer: Sequence[int]
) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """Return the log-probability of each token of an answer by training's forward pass.

    Args:
        run: A run of one rank.
        grid: Its grid.
        model: Its model.
        sample: The prompt.
        answer: The answer's tokens.

    Returns:
        [A], and the selections of each layer.
    """
    token_ids = np.concatenate([sample.token_ids, np.array(answer, dtype=np.int64)])
    weights = np.zeros(len(token_ids), dtype=np.float32)
    weights[len(sample.token_ids) - 1 : -1] = 1
    whole = replace(
        sample, token_ids=token_ids, labels=labels_of(token_ids, weights), weights=weights
    )
    row = pack([whole], len(token_ids) + 3, pad_token_id=0)
    run = replace(run, data=replace(run.data, row_tokens=len(row.token_ids)))
    stage: VirtualStage = model.stages[0].module
    own = {"device": next(stage.parameters()).device, "dtype": stage.config.params_dtype}
    batch = cut_row(row, run, grid.place()).to(own["device"])
    features = torch.zeros(0, run.model.decoder.hidden_size, **own)
    if row.pictures and model.vision is not None:
        patches = synthetic_patches(row.pictures).to(**own)
        features = model.vision(patches, [picture.patch_grid for picture in row.pictures])
    # The gradient of a label's weight is its cross entropy.
    weights_L = torch.ones(len(answer), **own, requires_grad=True)
    meter = SelectionMeter()
    loss = stage(
        replace(batch, weights_L=weights_L),
        features.detach(),
        indexer_loss_weight=0.0,
        meter=meter,
        where="test",
        phase=run.training.phase,
    )
    (losses_L,) = torch.autograd.grad(loss, weights_L)
    return -losses_L.cpu(), meter.selected
