# SPDX-License-Identifier: Apache-2.0
"""The weighted cross entropy has the gradient of the paper's objective, on every grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config import PostTrainingConfig, RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.batch import AnswerBatch
from megatron_keye.decoder.policy import policy_weights
from megatron_keye.decoder.row import RowMeter
from megatron_keye.post_training.answer_rows import LearnedAnswer, answer_rows
from megatron_keye.training.microbatch import cut_row
from tests.support.float64 import assert_trains_as, exact_run, without_trees
from tests.support.ranks import run_on_ranks
from tests.support.rollout import prompt
from tests.support.tiny import ROW_TOKENS, tiny_run
from tests.support.train import assert_same_training, build_step, let_go, train

WIDE = PostTrainingConfig(kind="gspo", clip_low=0.3, clip_high=0.4)


def formula(log_probs: list[Tensor], old: list[Tensor], advantages: Tensor, kind: str) -> Tensor:
    """Return the objective as the papers write it, a mean over answers."""
    terms = []
    for now, before, advantage in zip(log_probs, old, advantages, strict=True):
        log_ratio = now - before
        ratio = (log_ratio.mean() if kind == "gspo" else log_ratio).exp()
        clipped = ratio.clamp(1 - WIDE.clip_low, 1 + WIDE.clip_high)
        terms.append(torch.minimum(ratio * advantage, clipped * advantage).mean())
    return torch.stack(terms).mean()


def _largest_difference(kind: str) -> tuple[float, int, int]:
    """Return the largest difference of gradients, and how many answers were clipped or not."""
    draw = torch.Generator().manual_seed(3)
    settings, worst, num_clipped, num_free = replace(WIDE, kind=kind), 0.0, 0, 0
    for _ in range(200):
        lengths = torch.randint(1, 9, (5,), generator=draw).tolist()
        advantages = torch.randn(5, generator=draw, dtype=torch.float64)
        old = [-3 * torch.rand(n, generator=draw, dtype=torch.float64) for n in lengths]
        noise = [0.7 * torch.randn(n, generator=draw, dtype=torch.float64) for n in lengths]
        now = [(o + e).requires_grad_() for o, e in zip(old, noise, strict=True)]
        (-formula(now, old, advantages, kind)).backward()
        weights_L = policy_weights(
            torch.cat(now).detach(),
            AnswerBatch(
                answers_L=torch.repeat_interleave(torch.tensor(lengths)),
                places_L=torch.arange(sum(lengths)),
                old_log_probs_L=torch.cat(old),
                advantages_A=advantages,
            ),
            torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in lengths]),
            settings=settings,
            cp_group=dist.group.WORLD,
        )
        gradient = torch.cat([each.grad for each in now if each.grad is not None])
        worst = max(worst, float((gradient + weights_L / 5).abs().max()))
        num_clipped += int((weights_L == 0).sum())
        num_free += int((weights_L != 0).sum())
    return worst, num_clipped, num_free


@pytest.mark.parametrize("kind", ["gspo", "grpo"])
def test_weights_give_the_gradient_of_the_objective(kind: str) -> None:
    ((worst, num_clipped, num_free),) = run_on_ranks(1, _largest_difference, kind)
    assert worst < 1e-12
    assert min(num_clipped, num_free) > 500, "both cases are there"


def _weights_of_sick_answers() -> list[float]:
    before = torch.tensor([-1.0, torch.nan, -1.0, -torch.inf, -200.0], dtype=torch.float64)
    weights_L = policy_weights(
        torch.full((5,), -1.0, dtype=torch.float64),
        AnswerBatch(
            answers_L=torch.tensor([0, 1, 1, 2, 3]),
            places_L=torch.arange(5),
            old_log_probs_L=before,
            advantages_A=torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64),
        ),
        torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0]),
        settings=WIDE,
        cp_group=dist.group.WORLD,
    )
    return weights_L.tolist()


def test_an_answer_whose_ratio_is_not_finite_weighs_nothing_and_a_large_one_is_cut() -> None:
    (found,) = run_on_ranks(1, _weights_of_sick_answers)
    assert found[:4] == [1.0, 0.0, 0.0, 0.0]
    assert found[4] == pytest.approx(-np.exp(20))


def answers_to(seed: int, count: int, length: int, first: int) -> list[LearnedAnswer]:
    """Return random answers whose tokens are about as likely as the model finds them."""
    draw = np.random.default_rng(seed)
    answers = []
    for number in range(count):
        size = length + number
        answers.append(
            LearnedAnswer(
                token_ids=tuple(draw.integers(0, 90, size).tolist()),
                first_place=first,
                old_log_probs=-4.6 + 0.4 * draw.standard_normal(size),
                advantage=float(draw.standard_normal()),
            )
        )
        first += size
    return answers


def policy_rows(step: int) -> list[PackedRow]:
    """Return a global batch of answers to four prompts."""
    rows: list[PackedRow] = []
    prompts = [(9, ((4, 4),)), (16, ()), (11, ((2, 2), (2, 2))), (20, ())]
    for place, (number, pictures) in enumerate(prompts):
        asked = prompt(20 * step + place, number, *pictures)
        answers = answers_to(50 * step + place, 3, 5, 100 * place)
        rows += answer_rows([(asked, answers)], ROW_TOKENS, pad_token_id=0)
    assert len(rows) % 2 == 0, "replicas get equal numbers of rows"
    return rows


def run_of(kind: str = "gspo", **degrees: int) -> RunConfig:
    return replace(tiny_run(**degrees), post_training=replace(WIDE, kind=kind))


@pytest.mark.parametrize(
    "degrees",
    [
        {"context": 2},
        pytest.param({"tensor": 2, "expert": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_grid_learns_the_same(degrees: dict[str, int]) -> None:
    batches = [policy_rows(0), policy_rows(1)]
    assert_same_training(train(run_of(**degrees), batches), train(run_of(), batches))


@pytest.mark.parametrize("kind", ["gspo", "grpo"])
def test_answers_learn_behind_shared_prompts_as_behind_their_own(kind: str) -> None:
    groups = [
        (prompt(20, 16, (4, 4)), answers_to(50, 2, 5, 0)),
        (prompt(21, 6), answers_to(51, 2, 2, 100)),
    ]
    shared = answer_rows(groups, ROW_TOKENS, pad_token_id=0)
    alone = [
        without_trees(row)
        for asked, answers in groups
        for number, answer in enumerate(answers)
        for row in answer_rows(
            [(replace(asked, name=f"{asked.name} {number}"), [answer])], ROW_TOKENS, pad_token_id=0
        )
    ]
    assert len(shared) == 1 and len(alone) == 4
    run = replace(exact_run(context=2), post_training=replace(WIDE, kind=kind))
    assert_trains_as(run, shared, alone)


def _states_with_gradients(run_json: str, row: PackedRow) -> tuple[list[int], list[int]]:
    """Return the positions whose final state has a gradient, and those of labels."""
    run = RunConfig.from_json(run_json)
    grid, model, _, _ = build_step(run)
    stage = model.stages[0].module
    states: list[Tensor] = []
    stage.block.register_forward_hook(lambda module, inputs, output: states.append(output))
    batch = cut_row(row, run, grid.place())
    loss = stage(
        batch,
        torch.zeros(0, run.model.decoder.hidden_size),
        indexer_loss_weight=0.0,
        meter=RowMeter(),
        where="test",
        phase="dense",
    )
    (gradient_SBD,) = torch.autograd.grad(loss, states)
    has_gradient_S = gradient_SBD.abs().sum(dim=(1, 2)) != 0
    let_go(model)
    return has_gradient_S.nonzero().flatten().tolist(), batch.label_positions_L.tolist()


def test_tokens_of_prompts_and_padding_and_clipped_answers_have_no_gradient() -> None:
    answers = answers_to(1, 2, 6, 0)
    answers[0] = replace(answers[0], old_log_probs=np.full(6, -60.0), advantage=1.0)  # clipped
    answers[1] = replace(answers[1], old_log_probs=np.full(7, -60.0), advantage=-1.0)
    (row,) = answer_rows([(prompt(4, 10), answers)], ROW_TOKENS, pad_token_id=0)
    ((found, labelled),) = run_on_ranks(1, _states_with_gradients, run_of().to_json(), row)
    of_second = labelled[6:]
    assert len(of_second) == 7 and of_second[0] == 9 + 7, "the prompt's last token, laid again"
    assert found == of_second


def test_an_answer_weighs_the_same_however_long_it_is() -> None:
    answers = answers_to(1, 3, 4, 0)
    (row,) = answer_rows([(prompt(4, 2), answers)], ROW_TOKENS, pad_token_id=0)
    assert row.answers is not None and row.loss_weight == pytest.approx(3, rel=1e-6)
    for number in range(3):
        labels = row.weights[row.labels >= 0][row.answers.answers == number]
        assert len(labels) == 4 + number and labels.sum() == pytest.approx(1, rel=1e-6)
