# SPDX-License-Identifier: Apache-2.0
"""Tells all ranks what each replica has found in a tick."""

from collections.abc import Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.run import RunConfig
from megatron_keye.rollout.routes import note_routes, num_run
from megatron_keye.rollout.scheduler import ReplicaTick

Drawn = list[tuple[int, float]]
"""Token and log-probability of each answer that got one."""


def tell_drawn(
    ticks: Sequence[ReplicaTick], own: Tensor | None, run: RunConfig, device: torch.device
) -> list[Drawn]:
    """Return what every replica has drawn, on all ranks. Collective over all ranks.

    Args:
        ticks: What each replica has run.
        own: float64 [A, 2]: token and log-probability of each answer to which this rank's replica
            gave a token; None on a dedicated vision rank.
        run: Degrees.
        device: Where this rank computes.
    """
    counts = [len(tick.drawn) for tick in ticks]
    like = torch.empty(0, 2, dtype=torch.float64, device=device)
    found = _gather(own, counts, like, run.parallel.decoder.tensor)
    drawn = iter(torch.cat(found).tolist())
    return [
        [(int(token), log_prob) for token, log_prob in islice(drawn, count)] for count in counts
    ]


def tell_routes(
    ticks: Sequence[ReplicaTick], own: Tensor | None, run: RunConfig, device: torch.device
) -> None:
    """Note on all ranks where the tokens of every replica went. Collective over all ranks.

    Args:
        ticks: What each replica has run; its draws are not noted yet.
        own: uint8 [tokens, layers, experts of a token]: of this rank's replica; None on a
            dedicated vision rank.
        run: Sizes and degrees.
        device: Where this rank computes.
    """
    decoder = run.model.decoder
    size = (0, decoder.num_layers, decoder.experts.num_experts_per_token)
    like = torch.empty(size, dtype=torch.uint8, device=device)
    found = _gather(own, list(map(num_run, ticks)), like, run.parallel.decoder.tensor)
    for tick, experts in zip(ticks, found, strict=True):
        note_routes(tick, experts.cpu().numpy())


def _gather(
    own: Tensor | None, counts: Sequence[int], like: Tensor, num_tensor_ranks: int
) -> list[Tensor]:
    """Return what every replica has found, on all ranks. Collective over all ranks.

    Args:
        own: [n, ...] of this rank's replica, the same on its tensor ranks; None on a dedicated
            vision rank.
        counts: By replica, how many it has found: n.
        like: [0, ...] of this type, on this rank's device.
        num_tensor_ranks: Tensor ranks of a replica; ranks are numbered with tensor fastest.
    """
    if not any(counts):
        return [like for _ in counts]
    sent = like.new_zeros(max(counts), *like.shape[1:])
    if own is not None:
        sent[: len(own)] = own
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    firsts = parts[::num_tensor_ranks][: len(counts)]
    return [part[:count] for part, count in zip(firsts, counts, strict=True)]
