# SPDX-License-Identifier: Apache-2.0
"""Compares two global batches in float64: losses of each label, and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_keye.config import ExpertsConfig, RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder import virtual_stage
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.plan.places import decoder_place, owned_positions
from tests.support.ranks import run_on_ranks
from tests.support.tiny import ROW_TOKENS, tiny_model, tiny_run
from tests.support.train import build_step, let_go

EXPERTS = ExpertsConfig(
    num_experts=4, num_experts_per_token=2, intermediate_size=24, balance_loss_weight=0.0
)
"""No balancing loss, the one which a row has over its own tokens."""
TOLERANCE = 1e-12


def exact_run(training: dict[str, Any] | None = None, **degrees: int) -> RunConfig:
    """Return a run in float64 whose losses are sums over tokens."""
    options = {"precision": "fp64", **(training or {})}
    return tiny_run(model=tiny_model(experts=EXPERTS), training=options, **degrees)


def without_trees(row: PackedRow) -> PackedRow:
    """Return a row of one path each as rows are that know no branches."""
    return replace(row, prefix_trees=None)


def compute_on_rank(run_json: str, batches: list[list[PackedRow]]) -> list[tuple[Any, ...]]:
    """Return the sums of losses, all gradients, and losses by sample and row position."""
    run = RunConfig.from_json(run_json)
    grid, model, _, step = build_step(run)
    place = decoder_place(run.parallel.decoder, grid.rank)
    owned = owned_positions(ROW_TOKENS, run.parallel.decoder.context, place.context)
    forward, token_losses = VirtualStage.forward, virtual_stage.token_losses
    running: dict[str, Any] = {}
    losses: dict[tuple[str, int], float] = {}

    def recorded_forward(self: VirtualStage, batch: Any, *rest: Any, **named: Any) -> Any:
        running.update(batch=batch, where=named["where"].partition("row of ")[2])
        return forward(self, batch, *rest, **named)

    def recorded_losses(*arguments: Any) -> torch.Tensor:
        loss_LB = token_losses(*arguments)
        positions = owned[running["batch"].label_positions_L.numpy()].tolist()
        of_row = zip(positions, loss_LB.flatten().tolist(), strict=True)
        losses.update({(running["where"], position): loss for position, loss in of_row})
        return loss_LB

    VirtualStage.forward, virtual_stage.token_losses = recorded_forward, recorded_losses
    results = []
    try:
        for rows in batches:
            losses.clear()
            _, measured = step.compute_only(rows)
            gradients = {
                name: weight.main_grad.clone()
                for wrapped in model.wrapped()
                for name, weight in wrapped.module.named_parameters()
                if getattr(weight, "main_grad", None) is not None
            }
            results.append((measured, gradients, dict(losses)))
    finally:
        VirtualStage.forward, virtual_stage.token_losses = forward, token_losses
    let_go(model)
    return results


def assert_trains_as(run: RunConfig, shared: list[PackedRow], alone: list[PackedRow]) -> Any:
    """Compare losses and every gradient; return the losses by sample and position of both."""
    batches = [shared, alone]
    results = run_on_ranks(run.parallel.num_ranks, compute_on_rank, run.to_json(), batches)
    together: list[dict[tuple[str, int], float]] = [{}, {}]
    for (got, gradients, mine), (expected, wanted, theirs) in results:
        for figure in ("loss", "indexer KL"):
            sums = [sum(each.by_rank[figure]) for each in (got, expected)]
            assert sums[0] == pytest.approx(sums[1], rel=TOLERANCE), figure
        assert got.gradient_norm == pytest.approx(expected.gradient_norm, rel=TOLERANCE)
        assert gradients.keys() == wanted.keys() and gradients, "the same weights learn"
        for name, gradient in wanted.items():
            limit = TOLERANCE * float(gradient.abs().max())
            worst = float((gradients[name] - gradient).abs().max())
            assert worst <= limit, f"{name}: differs by {worst:.1e}, expected {limit:.1e} at most"
        for losses, of_rank in zip(together, (mine, theirs), strict=True):
            losses.update(of_rank)
    return together
