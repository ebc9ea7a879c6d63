# SPDX-License-Identifier: Apache-2.0
"""Compares where tokens go in generation and in training, with replayed choices and without."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_keye.config import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.router import Router
from megatron_keye.decoder.router_choices import RouterChoices
from megatron_keye.decoder.row import RowMeter
from megatron_keye.post_training.answer_rows import LearnedAnswer, answer_rows
from megatron_keye.rollout.request import Completion
from megatron_keye.training.microbatch import cut_row
from tests.support.rollout import build_engine, prompt, request
from tests.support.tiny import ROW_TOKENS
from tests.support.train import let_go

ASKED = request(0, prompt(1, 13), num_answers=3, max_new_tokens=9, seed=7)


def learned(completions: list[Completion], *, replays: bool) -> list[LearnedAnswer]:
    """Return the answers of a request as a step learns from them."""
    return [
        LearnedAnswer(
            token_ids=each.token_ids,
            first_place=100 * each.answer,
            old_log_probs=np.array(each.log_probs),
            advantage=1.0,
            routes=each.routes if replays else None,
        )
        for each in sorted(completions, key=lambda each: each.answer)
    ]


def _choices(model: Any, run: RunConfig, grid: Any, row: PackedRow) -> tuple[Tensor, Tensor]:
    """Return the experts of all tokens [T, L, K], and the labels' log-probabilities."""
    stage, meter = model.stages[0].module, RowMeter()
    listening = RouterChoices(stage)
    with torch.no_grad(), model.evaluation():
        own = {"device": next(stage.parameters()).device, "dtype": stage.config.params_dtype}
        stage(
            cut_row(row, run, grid.place()).to(own["device"]),
            torch.zeros(0, run.model.decoder.hidden_size, **own),
            indexer_loss_weight=0.0,
            meter=meter,
            where="test",
            phase=run.training.phase,
        )
    listening.close()
    return listening.take().cpu(), meter.log_probs[0][1].cpu()


def compare_choices(run_json: str) -> list[tuple[int, float]]:
    """Return for training with its own and with replayed choices how far it is from generation.

    All experts are nearly as likely as each other, and the logits of training's routers are a
    little off, as if they were computed in another order.

    Returns:
        The number of tokens and layers with another choice of experts, and the largest difference
        of log-probabilities.
    """
    run = RunConfig.from_json(run_json)
    engine, grid, model = build_engine(run, notes_routes=True)
    for router in filter(lambda each: isinstance(each, Router), model.stages[0].modules()):
        router.weight.data.mul_(0.02)
    completions = list(engine.generate([ASKED]))
    engine.sleep()
    draw, gating = torch.Generator().manual_seed(1), Router.gating
    rows = {
        replays: answer_rows(
            [(ASKED.prompt, learned(completions, replays=replays))], ROW_TOKENS, pad_token_id=0
        )[0]
        for replays in (False, True)
    }
    known = rows[True].routes
    assert known is not None
    is_known = known[:, 0, 0] != 255
    # The prompt's last token runs before each answer, and no answer's last one.
    num_run = 12 + sum(len(each.token_ids) for each in completions)
    assert is_known.sum() == num_run
    noise = torch.randn(4, ROW_TOKENS, 1, run.model.decoder.experts.num_experts, generator=draw)
    drawn = np.concatenate([each.old_log_probs for each in learned(completions, replays=False)])
    found = []

    def off(self: Router, input: Tensor) -> Tensor:
        return gating(self, input) + 0.002 * noise[self.layer_number - 1].to(input.device)

    Router.gating = off  # type: ignore[method-assign]
    try:
        for row in rows.values():
            experts, log_probs = _choices(model, run, grid, row)
            pair = experts[is_known], torch.from_numpy(known[is_known])
            differs = torch.ne(*(each.sort().values for each in pair))
            error = float((log_probs - torch.from_numpy(drawn)).abs().max())
            found.append((int(differs.any(dim=2).sum()), error))
    finally:
        Router.gating = gating  # type: ignore[method-assign]
    let_go(model)
    return found
