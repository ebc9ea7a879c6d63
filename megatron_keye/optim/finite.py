# SPDX-License-Identifier: Apache-2.0
"""Finds numbers that are not finite in what an optimizer updates, without a host synchronisation.

Adam turns one NaN in a moment into one in its weight while loss and gradients still look healthy.
A negative second moment, whose root is taken, does the same.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_keye.optim.staged_adamw import MASTER, StagedAdamW

StateKind = Literal["weights", "first moments", "second moments"]
STATE_KINDS: tuple[StateKind, ...] = ("weights", "first moments", "second moments")

_ROOTS_AT_ONCE = 1 << 24
"""Elements whose square roots are held at once: 64 MiB."""


def updated_state(
    optimizers: Sequence[MegatronOptimizer], *, is_away: bool
) -> dict[StateKind, list[Tensor]]:
    """Return what this rank updates: weights, or masters of rounded ones, and their moments.

    Args:
        optimizers: Of decoder and vision, as far as this rank has them.
        is_away: Whether what is offloaded to main memory is meant, or the rest.
    """
    state: dict[StateKind, list[Tensor]] = {kind: [] for kind in STATE_KINDS}
    for inner in _inner(optimizers):
        for group in inner.param_groups:
            for weight in group["params"]:
                is_offloaded = isinstance(inner, StagedAdamW) and inner.is_away(weight)
                if is_offloaded != is_away:
                    continue
                kept = inner.state.get(weight, {})
                state["weights"].append(kept.get(MASTER, weight).detach())
                if "exp_avg" in kept:  # From the first update on.
                    state["first moments"].append(kept["exp_avg"])
                    state["second moments"].append(kept["exp_avg_sq"])
    return state


def sick_marks(state: dict[StateKind, list[Tensor]], device: torch.device | int) -> Tensor:
    """Return for each kind of state 1.0 if a number of this rank is sick, else 0.0: float64 [3].

    Reads every tensor once, in a few kernels; second moments three times.

    Args:
        state: From `updated_state`.
        device: Of the result.
    """
    marks = [
        is_sick(state[kind], device, is_square=kind == "second moments") for kind in STATE_KINDS
    ]
    return torch.stack(marks).double()


def host_marks(state: dict[StateKind, list[Tensor]]) -> Tensor:
    """Return the same as `sick_marks` for state in main memory, which it reads once: float64 [3].

    Args:
        state: From `updated_state`.
    """
    marks = [
        any(_is_sick_on_host(tensor, is_square=kind == "second moments") for tensor in state[kind])
        for kind in STATE_KINDS
    ]
    return torch.tensor(marks, dtype=torch.float64)


def is_sick(tensors: Sequence[Tensor], device: torch.device | int, *, is_square: bool) -> Tensor:
    """Return whether any number is not finite, or negative where it is a square: bool [].

    Also whether the sum of a tensor's squares overflows, at numbers of 1e15 and more in float32.

    Args:
        tensors: Of any shapes and floating types.
        device: Where they are, but for those in main memory.
        is_square: Whether they are averages of squares.
    """
    device = torch.device(device)
    away = [tensor for tensor in tensors if tensor.device != device]
    if any(_is_sick_on_host(tensor, is_square=is_square) for tensor in away):
        return torch.ones((), dtype=torch.bool, device=device)
    tensors = [tensor for tensor in tensors if tensor.device == device]
    parts = _root_parts(tensors) if is_square else [[t for t in tensors if t.numel()]]
    norms = [norm for part in parts if part for norm in torch._foreach_norm(part)]
    if not norms:
        return torch.zeros((), dtype=torch.bool, device=device)
    return ~torch.stack([norm.double() for norm in norms]).isfinite().all()


def _is_sick_on_host(tensor: Tensor, *, is_square: bool) -> bool:
    """Return whether any number is not finite, or negative where it is a square."""
    if not tensor.numel():
        return False
    low, high = map(float, tensor.aminmax())
    return not (math.isfinite(low) and math.isfinite(high)) or (is_square and low < 0)


def _root_parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the square roots of all elements, a bounded number at once; of a negative one NaN."""
    waiting: list[Tensor] = []
    num_waiting = 0
    for tensor in tensors:
        for part in tensor.flatten().split(_ROOTS_AT_ONCE):
            if num_waiting + len(part) > _ROOTS_AT_ONCE:
                yield list(torch._foreach_sqrt(waiting))
                waiting, num_waiting = [], 0
            if len(part):
                waiting.append(part)
                num_waiting += len(part)
    if waiting:
        yield list(torch._foreach_sqrt(waiting))


def _inner(
    optimizers: Sequence[MegatronOptimizer],
) -> Iterator[torch.optim.Optimizer | StagedAdamW]:
    """Yield the optimizers behind Megatron's."""
    for optimizer in optimizers:
        chained = isinstance(optimizer, ChainedOptimizer)
        for part in optimizer.chained_optimizers if chained else [optimizer]:
            if part.optimizer is not None:
                yield part.optimizer
