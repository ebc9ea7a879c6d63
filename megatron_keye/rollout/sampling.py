# SPDX-License-Identifier: Apache-2.0
"""Draws tokens from logits whose vocabulary is split over tensor ranks, without gathering it.

One uniform number decides a token, by the inverse of the cumulative distribution in the order of
ids. Sums are in float64, since in float32 another split of the vocabulary changes draws.

Shape letters: B sequences, V vocabulary, X candidates.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_keye.decoder.cross_entropy import token_losses
from megatron_keye.rollout.request import SamplingLaw

_BLOCK_TOKENS = 1_024
"""Uniform numbers drawn at once; a generator takes 66 us to make."""
_CANDIDATES = 64
"""Likeliest tokens of each tensor rank among which top-p is looked for first."""


def uniform(seed: int, key: int, answer: int, number: int) -> float:
    """Return the uniform number in [0, 1) that decides a token.

    It depends on the arguments alone: not on batch, rank, time or device.

    Args:
        seed: Seed of the request.
        key: Number of the request.
        answer: Number of the answer.
        number: Number of the token within the answer.

    Source: Philox 4x64-10 (Salmon et al., 2011), keyed by seed and request, counted by answer and
    token.
    """
    return float(
        _uniform_block(seed, key, answer, number // _BLOCK_TOKENS)[number % _BLOCK_TOKENS]
    )


@lru_cache(maxsize=512)
def _uniform_block(seed: int, key: int, answer: int, block: int) -> NDArray[np.float64]:
    # A step of the counter gives four numbers.
    counter = [block * _BLOCK_TOKENS // 4, answer, 0, 0]
    bits = np.random.Philox(key=np.array([seed, key], dtype=np.uint64), counter=counter)
    return np.random.Generator(bits).random(_BLOCK_TOKENS)


@torch.no_grad()
def draw_tokens(
    logits_BV: Tensor,
    laws: Sequence[SamplingLaw],
    uniforms: Sequence[float],
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row. Collective over the tensor ranks.

    Args:
        logits_BV: [B, V/TP], this rank's part of the vocabulary, any float type; it may be
            overwritten.
        laws: Law of each row.
        uniforms: In [0, 1), one for each row; the same on all ranks.
        group: Tensor-parallel group.

    Returns:
        Token ids int64 [B], and the log-probability of each under its law, [B], float32 or, for
        float64 logits, float64; both are equal on all ranks.
    """
    logits_BV = _tempered(logits_BV, laws)
    kept_BV = _cut(logits_BV, laws, group) if any(law.is_cut for law in laws) else logits_BV
    is_greedy = [law.is_greedy for law in laws]
    token_B = _likeliest(logits_BV, group) if any(is_greedy) else None
    if not all(is_greedy):
        drawn_B = _invert(kept_BV.double(), uniforms, group)
        is_greedy_B = torch.tensor(is_greedy, device=logits_BV.device)
        token_B = drawn_B if token_B is None else torch.where(is_greedy_B, token_B, drawn_B)
    assert token_B is not None, "a row is greedy or drawn"
    loss_B1 = token_losses(kept_BV[:, None], token_B[:, None], group)
    return token_B, -loss_B1.squeeze(1)


def _tempered(logits_BV: Tensor, laws: Sequence[SamplingLaw]) -> Tensor:
    """Return logits / temperature in float32 or better."""
    wide_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    divisors = [law.temperature or 1.0 for law in laws]
    if all(divisor == 1 for divisor in divisors):
        return wide_BV
    return wide_BV / wide_BV.new_tensor(divisors)[:, None]


def _invert(logits_BV: Tensor, uniforms: Sequence[float], group: dist.ProcessGroup) -> Tensor:
    """Return the first id at which the cumulative probability exceeds a row's number."""
    largest_B1 = _largest(logits_BV, group)
    cumulative_BV = (logits_BV - largest_B1).exp().cumsum(dim=1)
    parts_RB = _gathered(cumulative_BV[:, -1], group)
    ends_RB = parts_RB.cumsum(dim=0)
    target_B = logits_BV.new_tensor(uniforms) * ends_RB[-1]
    # By rounding a target may equal the whole sum; it then belongs to the last id that counts.
    is_behind_RB = (ends_RB <= target_B) & (ends_RB < ends_RB[-1])
    owner_B = is_behind_RB.sum(dim=0)
    starts_RB = torch.cat([torch.zeros_like(ends_RB[:1]), ends_RB])
    inside_B1 = (target_B - starts_RB.gather(0, owner_B[None])[0])[:, None]
    is_before_BV = (cumulative_BV <= inside_B1) & (cumulative_BV < cumulative_BV[:, -1:])
    local_B = is_before_BV.sum(dim=1)
    rank = group.rank()
    token_B = torch.where(owner_B == rank, local_B + rank * logits_BV.shape[1], 0)
    dist.all_reduce(token_B, group=group)
    return token_B


def _likeliest(logits_BV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the id of the largest logit, the smallest of equal ones."""
    largest_B1 = _largest(logits_BV, group)
    size, rank = logits_BV.shape[1], group.rank()
    ids_V = torch.arange(rank * size, (rank + 1) * size, device=logits_BV.device)
    nowhere = size * group.size()
    token_B = torch.where(logits_BV == largest_B1, ids_V, nowhere).amin(dim=1)
    dist.all_reduce(token_B, op=dist.ReduceOp.MIN, group=group)
    return token_B


def _cut(logits_BV: Tensor, laws: Sequence[SamplingLaw], group: dist.ProcessGroup) -> Tensor:
    """Return the logits with -inf for what a row's law leaves out.

    Whatever equals the last one kept is kept too, so that the order of equal ones is no matter.
    """
    wide_BV, size = logits_BV.double(), logits_BV.shape[1] * group.size()
    top_k_B = torch.tensor(
        [min(law.top_k, size) if law.top_k and law.is_cut else size for law in laws],
        device=logits_BV.device,
    )
    top_p_B = wide_BV.new_tensor([law.top_p if law.is_cut else 1.0 for law in laws])
    ranks_of_k = [law.top_k for law in laws if law.is_cut and law.top_k]
    num_candidates = max([_CANDIDATES, *ranks_of_k])
    while True:
        best_BX = _best(wide_BV, num_candidates, group)
        threshold_B1, is_found = _threshold(wide_BV, best_BX, top_k_B, top_p_B, group)
        if is_found or num_candidates >= logits_BV.shape[1]:
            return logits_BV.masked_fill(wide_BV < threshold_B1, -torch.inf)
        num_candidates *= 8


def _best(logits_BV: Tensor, num_candidates: int, group: dist.ProcessGroup) -> Tensor:
    """Return the largest logits of all ranks together, descending, without a gap among them."""
    num_local = min(num_candidates, logits_BV.shape[1])
    local_BX = logits_BV.topk(num_local, dim=1).values
    best_BX = _gathered(local_BX, group).transpose(0, 1).flatten(1).sort(descending=True).values
    # Behind these, another rank may have larger ones that it did not send.
    return best_BX if num_local == logits_BV.shape[1] else best_BX[:, :num_local]


def _threshold(
    logits_BV: Tensor,
    best_BX: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    group: dist.ProcessGroup,
) -> tuple[Tensor, bool]:
    """Return the smallest logit that each row keeps, and whether the candidates show it."""
    num_best = best_BX.shape[1]
    is_all_B = top_k_B > num_best
    of_k_B1 = best_BX.gather(1, (top_k_B.clamp(max=num_best) - 1)[:, None])
    of_k_B1 = of_k_B1.masked_fill(is_all_B[:, None], -torch.inf)
    largest_B1 = best_BX[:, :1]
    kept_BV = logits_BV.masked_fill(logits_BV < of_k_B1, -torch.inf)
    total_B = _gathered((kept_BV - largest_B1).exp().sum(dim=1), group).sum(dim=0)
    shares_BX = best_BX.masked_fill(best_BX < of_k_B1, -torch.inf)
    cumulative_BX = (shares_BX - largest_B1).exp().cumsum(dim=1)
    is_short_BX = cumulative_BX < (top_p_B * total_B)[:, None]
    place_B = is_short_BX.sum(dim=1)
    cuts_B = top_p_B < 1
    of_p_B1 = best_BX.gather(1, place_B.clamp(max=num_best - 1)[:, None])
    of_p_B1 = of_p_B1.masked_fill(~cuts_B[:, None], -torch.inf)
    is_found = bool(((place_B < num_best) | ~cuts_B).all())
    return torch.maximum(of_k_B1, of_p_B1), is_found


def _largest(logits_BV: Tensor, group: dist.ProcessGroup) -> Tensor:
    largest_B1 = logits_BV.amax(dim=1, keepdim=True)
    dist.all_reduce(largest_B1, op=dist.ReduceOp.MAX, group=group)
    return largest_B1


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [TP, ...], every rank's part in rank order."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)
