# SPDX-License-Identifier: Apache-2.0
"""The CUDA lightning indexer on rounded queries and keys, which it multiplies as e4m3 numbers.

What no sum cuts off it selects bit for bit (test_lightning_indexer_cuda.py); here the sums are
those of random vectors, and a key that is left scores no better than the error of two scores.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_keye.kernels.extension import missing_reason
from megatron_keye.kernels.indexer_quantization import round_to_fp8, split_rounded
from megatron_keye.kernels.indexer_scores import indexer_scores
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from tests.support.e4m3_dots import bound_error, hopper_dots
from tests.support.numerics import make_tensor, odd_ranges

needs_extension = pytest.mark.skipif(
    not torch.cuda.is_available() or missing_reason("lightning_indexer") is not None,
    reason="no CUDA device, or megatron_keye._C is not built",
)
Spoil = Callable[[Tensor, Tensor, Tensor], None]


def as_drawn(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    pass


def with_a_mean(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    # What every key has in common makes sums large, of which less is kept than they differ by.
    q_TIJ += 2
    k_SJ += 2


def with_outliers(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    q_TIJ[..., ::8] *= 20
    k_SJ[:, 5] *= 100


def of_many_sizes(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> None:
    k_SJ *= torch.logspace(-4, 4, len(k_SJ), dtype=k_SJ.dtype)[:, None]
    q_TIJ *= torch.logspace(-4, 4, q_TIJ.shape[1], dtype=q_TIJ.dtype)[:, None]
    gate_TI /= torch.logspace(-4, 4, gate_TI.shape[1], dtype=gate_TI.dtype)


SPOILS = [as_drawn, with_a_mean, with_outliers, of_many_sizes]


def make_rounded(
    num_queries: int, num_keys: int, num_heads: int, spoil: Spoil
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TIJ, k_SJ and gate_TI, the former two rounded to 8 bits."""
    q_TIJ = make_tensor(num_queries, num_heads, 64, seed=1)
    k_SJ = make_tensor(num_keys, 64, seed=2)
    gate_TI = make_tensor(num_queries, num_heads, seed=3)
    spoil(q_TIJ, k_SJ, gate_TI)
    q_TIJ, k_SJ = (round_to_fp8(each.bfloat16(), impl="eager") for each in (q_TIJ, k_SJ))
    return q_TIJ, k_SJ, gate_TI.float()


def bound_scores(q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor) -> Tensor:
    """Return how much scores of e4m3 products may be off, the sum over heads included."""
    (q_TIJ, query_scale_TI), (k_SJ, key_scale_S) = split_rounded(q_TIJ), split_rounded(k_SJ)
    error_TS = torch.zeros(len(q_TIJ), len(k_SJ), dtype=torch.float64, device=k_SJ.device)
    for head in range(q_TIJ.shape[1]):
        weight_T = gate_TI[:, head].abs().double() * query_scale_TI[:, head] * 64**-0.5
        for query, weight in enumerate(weight_T):
            q_J = q_TIJ[query, head].double()
            dots_S = (k_SJ.double() * q_J).sum(-1).abs()
            error_TS[query] += weight * (bound_error(q_J, k_SJ) + 2.0**-18 * dots_S)
    return error_TS * key_scale_S


@pytest.mark.parametrize("spoil", SPOILS)
def test_the_bound_holds_for_what_hopper_computes(spoil: Spoil) -> None:
    q_TIJ, k_SJ, _ = make_rounded(3, 700, 4, spoil)
    q_X1J, k_SJ = split_rounded(q_TIJ.flatten(0, 1)[:, None])[0], split_rounded(k_SJ)[0]
    exact_XS = (q_X1J.double() * k_SJ.double()).sum(-1)
    error_XS = (hopper_dots(q_X1J, k_SJ) - exact_XS).abs()
    assert (error_XS > 0).any(), "nothing is cut off"
    assert (error_XS / bound_error(q_X1J, k_SJ)).max() < 1


def test_small_integers_are_summed_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randint(-3, 4, (2, 500, 64), generator=generator).to(torch.float8_e4m3fn)
    assert torch.equal(hopper_dots(a, b), (a.double() * b.double()).sum(-1))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_other_implementations_select_as_ever(impl: str) -> None:
    q_TIJ, k_SJ, gate_TI = make_rounded(20, 300, 3, as_drawn)
    where = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    ranges = odd_ranges(20, 300, seed=4)
    inputs = [each.to(where) for each in (q_TIJ, k_SJ, gate_TI, *ranges)]
    rounded_TK = lightning_indexer(*inputs, 17, is_rounded=True, impl=impl)
    assert torch.equal(rounded_TK, lightning_indexer(*inputs, 17, impl=impl))


@pytest.mark.gpu
@needs_extension
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize(("num_keys", "num_heads"), [(20_001, 16), (9000, 5)])
def test_no_key_is_left_that_scores_better(num_keys: int, num_heads: int, spoil: Spoil) -> None:
    inputs = [each.cuda() for each in make_rounded(30, num_keys, num_heads, spoil)]
    ranges = [each.cuda() for each in odd_ranges(30, num_keys, seed=4)]
    indices_TK = lightning_indexer(*inputs, *ranges, 1000, is_rounded=True, impl="cuda")
    start_T, end_T = ranges
    is_real_TK = indices_TK >= 0
    wanted_T = (end_T.clamp(max=num_keys) - start_T).clamp(0, 1000)
    assert torch.equal(is_real_TK.sum(1), wanted_T), "as many as there are"
    taken_TS = torch.zeros(30, num_keys, dtype=torch.bool, device="cuda")
    row_TK = torch.arange(30, device="cuda")[:, None].expand_as(indices_TK)
    taken_TS[row_TK[is_real_TK], indices_TK[is_real_TK].long()] = True
    assert torch.equal(taken_TS.sum(1), wanted_T), "none twice"
    exact_TS = indexer_scores(*(each.double() for each in inputs), *ranges, impl="eager")
    assert not exact_TS[taken_TS].isinf().any(), "none outside of the range"
    error_TS = bound_scores(*inputs)
    worst_T = torch.where(taken_TS, exact_TS + error_TS, torch.inf).amin(1)
    best_left_T = torch.where(taken_TS, -torch.inf, exact_TS - error_TS).amax(1)
    assert bool((worst_T >= best_left_T).all()), "a better key was left"


@pytest.mark.gpu
@needs_extension
def test_of_random_vectors_nearly_the_same_keys_are_selected() -> None:
    q_TIJ, k_SJ, gate_TI = (each.cuda() for each in make_rounded(200, 40_000, 16, as_drawn))
    ranges = (
        torch.zeros(200, dtype=torch.int64, device="cuda"),
        torch.arange(39_801, 40_001, device="cuda"),
    )
    inputs = q_TIJ, k_SJ, gate_TI, *ranges, 2048
    exact_TK = lightning_indexer(*inputs, impl="cuda")
    rounded_TK = lightning_indexer(*inputs, is_rounded=True, impl="cuda")
    assert not torch.equal(exact_TK, rounded_TK), "the products are not the same"
    same_T = torch.stack(
        [torch.isin(a, b).sum() for a, b in zip(exact_TK, rounded_TK, strict=True)]
    )
    assert same_T.sum() / rounded_TK.numel() > 0.999
    again_TK = lightning_indexer(*inputs, is_rounded=True, impl="cuda")
    assert torch.equal(rounded_TK, again_TK), "another call"
