# SPDX-License-Identifier: Apache-2.0
"""Known experts lie in a row as the tokens do that were routed to them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_keye.data.row import NO_EXPERT, Sample, labels_of
from megatron_keye.post_training.answer_rows import LearnedAnswer, answer_rows
from megatron_keye.rollout.request import AnswerRoutes

Group = tuple[Sample, list[LearnedAnswer]]


def marked(token_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return experts [T, 2, 3] that say which token they are of."""
    return np.broadcast_to(token_ids[:, None, None], (len(token_ids), 2, 3)).astype(np.uint8)


@pytest.mark.parametrize("lengths", [(4,), (3, 1, 2), (6, 6, 6, 6)])
def test_experts_lie_where_their_tokens_do(lengths: tuple[int, ...]) -> None:
    tokens = np.arange(5)
    nothing = np.zeros(5, dtype=np.float32)
    prompt = Sample(
        name="clips.jsonl:4",
        token_ids=tokens,
        labels=labels_of(tokens, nothing),
        weights=nothing,
        pictures=(),
        picture_starts=(),
    )
    answers = []
    for number, length in enumerate(lengths):
        own = 10 * (number + 1) + np.arange(length)
        experts = marked(own)
        experts[-1] = NO_EXPERT  # It did not run.
        answers.append(
            LearnedAnswer(
                token_ids=tuple(own.tolist()),
                first_place=0,
                old_log_probs=np.zeros(length),
                advantage=1.0,
                # The second answer ended in another process.
                routes=None if number == 1 else AnswerRoutes(marked(tokens), experts),
            )
        )
    rows = answer_rows([(prompt, answers)], 20, pad_token_id=99)
    num_known = 0
    for row in rows:
        assert row.routes is not None and row.routes.shape == (20, 2, 3)
        is_known = row.routes[:, 0, 0] != NO_EXPERT
        assert (row.routes[is_known] == row.token_ids[is_known, None, None]).all()
        assert (row.routes[~is_known] == NO_EXPERT).all()
        num_known += int(is_known.sum())
    without = sum(n - 1 for number, n in enumerate(lengths) if number != 1)
    # Behind a prompt alone in its row no token of it is laid again.
    repeated = sum(4 + (len(set(row.answers.answers)) if row.answers else 0) for row in rows)
    assert num_known == without + repeated


def test_prompts_that_share_a_row_keep_their_experts() -> None:
    def asked(tokens: NDArray[np.int64], known: bool, count: int) -> Group:
        nothing = np.zeros(len(tokens), dtype=np.float32)
        prompt = Sample(
            name="clips.jsonl:4",
            token_ids=tokens,
            labels=labels_of(tokens, nothing),
            weights=nothing,
            pictures=(),
            picture_starts=(),
        )
        answers = [
            LearnedAnswer(
                token_ids=tuple(own.tolist()),
                first_place=0,
                old_log_probs=np.zeros(3),
                advantage=1.0,
                routes=AnswerRoutes(marked(tokens), marked(own)) if known else None,
            )
            for own in (tokens[0] + 10 * (1 + np.arange(count)))[:, None] + np.arange(3)
        ]
        return prompt, answers

    groups = [asked(np.arange(1, 5), True, 2), asked(np.arange(101, 105), False, 2)]
    groups.append(asked(np.arange(201, 206), True, 1))
    (row,) = answer_rows(groups, 40, pad_token_id=0)
    assert row.routes is not None
    expected = np.where(row.token_ids // 100 == 1, NO_EXPERT, row.token_ids)
    expected[row.token_ids == 0] = NO_EXPERT
    assert (row.routes == expected[:, None, None]).all()
