# SPDX-License-Identifier: Apache-2.0
"""Draws follow their law, and the split of the vocabulary over ranks changes none."""

from typing import Any

import numpy as np
import torch

from megatron_keye.rollout.request import SamplingLaw
from megatron_keye.rollout.sampling import draw_tokens, uniform
from tests.support.ranks import run_on_ranks

VOCABULARY = 48
LAWS = [
    SamplingLaw(),
    SamplingLaw(temperature=0.5),
    SamplingLaw(temperature=2.0, top_p=0.6),
    SamplingLaw(top_k=5),
    SamplingLaw(top_k=7, top_p=0.5, temperature=1.5),
    SamplingLaw(top_p=1e-9),
    SamplingLaw(top_k=VOCABULARY + 9, top_p=0.999999),
    SamplingLaw(temperature=0.0),
    SamplingLaw(temperature=0.0, top_k=3),
]


def logits(seed: int, num_rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return logits with a few equal ones."""
    drawn = torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    drawn[:, 3] = drawn[:, 40]
    return drawn.to(dtype)


def law_of(row: torch.Tensor, law: SamplingLaw) -> torch.Tensor:
    """Return the probabilities that a law gives, written out plainly in float64."""
    wide = row.double()
    if law.is_greedy:
        return (torch.arange(len(wide)) == int(wide.argmax())).double()
    wide = wide / law.temperature
    order = wide.sort(descending=True).values
    if law.top_k:
        wide = wide.masked_fill(wide < order[min(law.top_k, len(order)) - 1], -torch.inf)
    probabilities = wide.softmax(0)
    best = probabilities.sort(descending=True).values
    last = int((best.cumsum(0) < law.top_p).sum().clamp(max=len(best) - 1))
    if law.top_p < 1:
        probabilities = probabilities * (probabilities >= best[last])
    return probabilities / probabilities.sum()


def _draw(rows: torch.Tensor, laws: list[SamplingLaw], uniforms: list[float]) -> Any:
    group = torch.distributed.group.WORLD
    own = rows.chunk(group.size(), dim=1)[group.rank()].contiguous()
    tokens, log_probs = draw_tokens(own.clone(), laws, uniforms, group)
    return tokens, log_probs


def test_a_draw_is_the_inverse_of_the_cumulative_law_on_any_split() -> None:
    rows = logits(0, 60 * len(LAWS))
    laws = LAWS * 60
    uniforms = [uniform(1, 2, 3, number) for number in range(len(rows))]
    expected = [law_of(row, law) for row, law in zip(rows, laws, strict=True)]
    tokens = [
        int((cumulative <= u * cumulative[-1]).sum())
        for cumulative, u in zip((p.cumsum(0) for p in expected), uniforms, strict=True)
    ]
    for num_ranks in (1, 2):
        for drawn, log_probs in run_on_ranks(num_ranks, _draw, rows, laws, uniforms):
            assert drawn.tolist() == tokens
            for row, law, token, got in zip(rows, laws, tokens, log_probs.tolist(), strict=True):
                # The greedy law's own would always be 0.
                told = SamplingLaw() if law.is_greedy else law
                assert abs(got - float(law_of(row, told)[token].log())) < 2e-6


def test_frequencies_are_those_of_the_law() -> None:
    row, num_draws = logits(5, 1)[0], 10_000
    uniforms = [uniform(7, 0, 0, number) for number in range(num_draws)]
    for law in (SamplingLaw(), SamplingLaw(top_k=6, temperature=1.3)):
        arguments = row.expand(num_draws, -1), [law] * num_draws, uniforms
        ((drawn, _),) = run_on_ranks(1, _draw, *arguments)
        expected = law_of(row, law).numpy() * num_draws
        counts = np.bincount(drawn.numpy(), minlength=VOCABULARY)
        assert not counts[expected == 0].any()
        likely = expected > 5
        statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
        # Mean plus five standard deviations of chi-square.
        degrees = int(likely.sum()) - 1
        assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_ends_of_the_interval_draw_tokens_that_have_probability() -> None:
    rows = torch.full((3, VOCABULARY), -1e4)
    rows[:, 20:23] = 0.0
    uniforms = [0.0, 1 - 2**-53, 0.5]
    for num_ranks in (1, 2):
        for drawn, _ in run_on_ranks(num_ranks, _draw, rows, [SamplingLaw()] * 3, uniforms):
            assert drawn.tolist() == [20, 22, 21]


def test_uniform_numbers_depend_on_their_place_alone() -> None:
    one = np.random.Generator(np.random.Philox(key=np.array([4, 9], dtype=np.uint64)))
    stream = one.random(3000)
    assert [uniform(4, 9, 0, number) for number in (0, 1023, 1024, 2999)] == [
        stream[number] for number in (0, 1023, 1024, 2999)
    ]
    others = {uniform(4, 9, 1, 0), uniform(4, 8, 0, 0), uniform(5, 9, 0, 0), stream[0]}
    assert len(others) == 4
