# SPDX-License-Identifier: Apache-2.0
"""Training routes tokens as generation did, where its own router would choose otherwise."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_keye.config import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.post_training.answer_rows import LearnedAnswer, answer_rows
from megatron_keye.rollout.request import AnswerRoutes, Completion, Experts, Request
from tests.support.ranks import run_on_ranks
from tests.support.rollout import build_engine, prompt, request
from tests.support.rollout_cases import SMALL, tiny
from tests.support.routes import ASKED, compare_choices
from tests.support.tiny import ROW_TOKENS, tiny_run
from tests.support.train import assert_same_training, let_go, train


def _generate(run_json: str, requests: list[Request]) -> list[Completion]:
    engine, _, model = build_engine(RunConfig.from_json(run_json), notes_routes=True)
    completions = list(engine.generate(requests))
    engine.sleep()
    let_go(model)
    return completions


def test_a_token_goes_where_generation_sent_it() -> None:
    run = tiny("fp32", training={"phase": "dense"})
    ((own, replayed),) = run_on_ranks(1, compare_choices, run.to_json())
    assert own[0] > 0 == replayed[0]
    assert own[1] > 0.1 and replayed[1] < 0.01, "what is left comes from the logits alone"


@pytest.mark.slow
def test_routes_do_not_depend_on_pieces_preemption_or_grid() -> None:
    requests = [ASKED, request(1, prompt(2, 30, (4, 4)), max_new_tokens=5)]
    small = replace(SMALL, prefill_tokens=7, cache_tokens=72, page_tokens=2)
    runs = [tiny("fp64"), tiny("fp64", tensor=2, expert=2, rollout=small)]
    found = []
    for run in runs:
        (completions, *_) = run_on_ranks(
            run.parallel.num_ranks, _generate, run.to_json(), requests
        )
        routes = {(each.key, each.answer): each.routes for each in completions}
        assert len(routes) == 4
        found.append(routes)
    for key, one in found[0].items():
        other = found[1][key]
        for part in ("prompt", "answer"):
            assert np.array_equal(np.sort(getattr(one, part)), np.sort(getattr(other, part))), (
                key,
                part,
            )


def routed(draw: np.random.Generator, num_tokens: int) -> Experts:
    """Return any two of four experts for each token in four layers."""
    return np.argsort(draw.random((num_tokens, 4, 4)))[:, :, :2].astype(np.uint8)


def _rows(*, replays: bool) -> list[PackedRow]:
    """Return rows whose tokens were routed anywhere, where that is known, or freely."""
    draw, rows = np.random.default_rng(7), []
    for place in range(4):
        asked = prompt(20 + place, 9, (4, 4))
        of_prompt = routed(draw, len(asked.token_ids))
        answers = []
        for number in range(3):
            routes = AnswerRoutes(of_prompt, routed(draw, 6))
            answers.append(
                LearnedAnswer(
                    token_ids=tuple(draw.integers(0, 90, 6).tolist()),
                    first_place=10 * number,
                    old_log_probs=np.full(6, -4.6),
                    advantage=float(draw.standard_normal()),
                    routes=routes if replays and number > 0 else None,
                )
            )
        rows += answer_rows([(asked, answers)], ROW_TOKENS, pad_token_id=0)
    return rows


def run_of(recompute: str = "none", **degrees: int) -> RunConfig:
    run = tiny_run(training={"recompute": recompute}, **degrees)
    wide = replace(run.post_training, kind="gspo", clip_low=0.5, clip_high=2.0)
    return replace(run, post_training=replace(wide, replays_routes=True))


@pytest.fixture(scope="module")
def alone() -> Any:
    """Return what one rank learns, without computing anything again."""
    return train(run_of(), [_rows(replays=True)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "degrees"),
    [
        ("full", {"context": 2}),
        ("experts", {"tensor": 2, "expert": 2}),
        ("selective", {"pipeline": 2}),
    ],
)
def test_every_grid_replays_the_same(recompute: str, degrees: dict[str, int], alone: Any) -> None:
    assert_same_training(train(run_of(recompute, **degrees), [_rows(replays=True)]), alone)


@pytest.mark.slow
def test_replay_changes_where_tokens_go(alone: Any) -> None:
    free = train(run_of(), [_rows(replays=False)])
    assert abs(free.metrics[0].loss - alone.metrics[0].loss) > 1e-3
