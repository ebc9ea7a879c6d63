"""A row whose documents branch trains as rows of one path each, in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_keye.config import ExpertsConfig, RunConfig
from megatron_keye.data.branches import Branch, BranchedSample, branch_of, pack_branches
from megatron_keye.data.row import PackedRow, Sample, labels_of
from megatron_keye.decoder import virtual_stage
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.plan.places import decoder_place, owned_positions
from megatron_keye.post_training.rows import Answer, shared_prompt_rows
from tests.support.ranks import run_on_ranks
from tests.support.tiny import ROW_TOKENS, packed_row, tiny_model, tiny_run
from tests.support.train import build_step, let_go

EXPERTS = ExpertsConfig(
    num_experts=4, num_experts_per_token=2, intermediate_size=24, balance_loss_weight=0.0
)
"""No balancing loss, the one which a row has over its own tokens."""
TOLERANCE = 1e-12
PHASES = [
    pytest.param({"recompute": "full"}, id="sparse"),
    pytest.param({"phase": "indexer_warmup"}, id="warm-up"),
    pytest.param({"recompute": "none"}, id="sparse, nothing recomputed", marks=pytest.mark.slow),
    pytest.param({"recompute": "selective"}, id="sparse, kept outputs", marks=pytest.mark.slow),
    pytest.param({"phase": "dense"}, id="dense", marks=pytest.mark.slow),
]
TWO_RANKS = [
    pytest.param({}, {"context": 2, "expert": 2}, id="context, expert"),
    pytest.param({}, {"tensor": 2, "expert": 2}, id="tensor, expert"),
    pytest.param(
        {"phase": "indexer_warmup"}, {"context": 2}, id="warm-up, context", marks=pytest.mark.slow
    ),
    pytest.param({"phase": "dense"}, {"context": 2}, id="dense, context", marks=pytest.mark.slow),
]


def exact_run(training: dict[str, Any] | None = None, **degrees: int) -> RunConfig:
    """Return a run in float64 whose losses are sums over tokens."""
    options = {"precision": "fp64", **(training or {})}
    return tiny_run(model=tiny_model(experts=EXPERTS), training=options, **degrees)


def video_prompt() -> Sample:
    """Return a prompt of two frames and text, without labels."""
    row = packed_row(5, (8, ((4, 4), (2, 4))))
    token_ids = row.token_ids[: row.num_real_tokens]
    nothing = np.zeros(len(token_ids), dtype=np.float32)
    return Sample(
        name="prompt",
        token_ids=token_ids,
        labels=labels_of(token_ids, nothing),
        weights=nothing,
        pictures=row.pictures,
        picture_starts=row.picture_starts,
    )


def answers_to_it(*lengths: int) -> list[Answer]:
    """Return random answers; one token of each does not count."""
    generator = np.random.default_rng(7)
    answers = []
    for length in lengths:
        weights = generator.uniform(0.5, 2, length).astype(np.float32)
        weights[length // 2] = 0
        answers.append(Answer(token_ids=generator.integers(0, 90, length), weights=weights))
    return answers


def branching_turns() -> tuple[PackedRow, list[PackedRow]]:
    """Return a row of a prompt, two turns behind it and two behind each, and one of each path."""
    generator = np.random.default_rng(8)

    def turn(length: int, parent: int, weight: float) -> Branch:
        weights = np.full(length, weight, dtype=np.float32)
        return Branch(
            token_ids=generator.integers(0, 90, length), token_weights=weights, parent=parent
        )

    start = branch_of(video_prompt())
    leaves = [turn(5, 1, 1), turn(7, 1, 1), turn(4, 4, 1), turn(6, 4, 1)]
    first, second = turn(6, 0, 2), turn(3, 0, 2)
    tree = (start, first, *leaves[:2], second, *leaves[2:])
    shared = pack_branches(
        [BranchedSample(name="tree", branches=tree)], ROW_TOKENS, pad_token_id=0
    )
    alone = []
    for number, leaf in enumerate(leaves):
        middle = first if number < 2 else second
        # What two paths share weighs as much as in both.
        halved = replace(middle, token_weights=middle.token_weights / 2)
        path = (start, halved, replace(leaf, parent=1))
        sample = BranchedSample(name=f"path {number}", branches=path)
        alone.append(pack_branches([sample], ROW_TOKENS, pad_token_id=0))
    return shared, alone


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
        assert got.loss_sum == pytest.approx(expected.loss_sum, rel=TOLERANCE)
        assert got.gradient_norm == pytest.approx(expected.gradient_norm, rel=TOLERANCE)
        assert gradients.keys() == wanted.keys() and gradients, "the same weights learn"
        for name, gradient in wanted.items():
            limit = TOLERANCE * float(gradient.abs().max())
            worst = float((gradients[name] - gradient).abs().max())
            assert worst <= limit, f"{name}: differs by {worst:.1e}, expected {limit:.1e} at most"
        for losses, of_rank in zip(together, (mine, theirs), strict=True):
            losses.update(of_rank)
    return together


def assert_answers_train_as_alone(run: RunConfig) -> None:
    """Compare a shared row with a row for each answer, log-probabilities of tokens included."""
    prompt, answers = video_prompt(), answers_to_it(7, 1, 11, 9)
    (shared,) = shared_prompt_rows(prompt, answers, ROW_TOKENS, pad_token_id=0)
    alone = [
        shared_prompt_rows(replace(prompt, name=name), [answer], ROW_TOKENS, pad_token_id=0)[0].row
        for name, answer in zip("abcd", answers, strict=True)
    ]
    mine, theirs = assert_trains_as(run, [shared.row], [without_trees(row) for row in alone])
    # By row and position, which is answer by answer.
    expected = [loss for _, loss in sorted(theirs.items())]
    assert len(expected) == sum(np.count_nonzero(answer.weights) for answer in answers)
    np.testing.assert_allclose(
        [loss for _, loss in sorted(mine.items())], expected, rtol=TOLERANCE, atol=0
    )


@pytest.mark.parametrize("training", PHASES)
def test_answers_behind_one_prompt_train_as_rows_of_their_own(training: dict[str, Any]) -> None:
    assert_answers_train_as_alone(exact_run(training))


@pytest.mark.parametrize(("training", "degrees"), TWO_RANKS)
def test_they_do_so_on_two_ranks(training: dict[str, Any], degrees: dict[str, int]) -> None:
    assert_answers_train_as_alone(exact_run(training, **degrees))


def test_branches_of_branches_train_as_their_paths() -> None:
    shared, alone = branching_turns()
    run = exact_run(context=2)
    assert_trains_as(run, [shared], [without_trees(row) for row in alone])
