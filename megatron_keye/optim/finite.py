"""Finds numbers that are not finite in what an optimizer updates, without a host synchronisation.

Adam turns one NaN in a moment into one in its weight while loss and gradients still look healthy.
A negative second moment, whose root is taken, does the same.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

StateKind = Literal["weights", "first moments", "second moments"]
STATE_KINDS: tuple[StateKind, ...] = ("weights", "first moments", "second moments")

_ROOTS_AT_ONCE = 1 << 24
"""Elements whose square roots are held at once: 64 MiB."""


def updated_state(optimizers: Sequence[MegatronOptimizer]) -> dict[StateKind, list[Tensor]]:
    """Return what this rank updates: weights, or masters of rounded ones, and their moments.

    Args:
        optimizers: Of decoder and vision, as far as this rank has them.
    """
    state: dict[StateKind, list[Tensor]] = {kind: [] for kind in STATE_KINDS}
    for inner in _inner(optimizers):
        for group in inner.param_groups:
            for weight in group["params"]:
                moments = inner.state.get(weight, {})
                state["weights"].append(weight.detach())
                if "exp_avg" in moments:  # From the first update on.
                    state["first moments"].append(moments["exp_avg"])
                    state["second moments"].append(moments["exp_avg_sq"])
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


def is_sick(tensors: Sequence[Tensor], device: torch.device | int, *, is_square: bool) -> Tensor:
    """Return whether any number is not finite, or negative where it is a square: bool [].

    Also whether the sum of a tensor's squares overflows, at numbers of 1e15 and more in float32.

    Args:
        tensors: Of any shapes and floating types.
        device: Where they are.
        is_square: Whether they are averages of squares.
    """
    parts = _root_parts(tensors) if is_square else [[t for t in tensors if t.numel()]]
    norms = [norm for part in parts if part for norm in torch._foreach_norm(part)]
    if not norms:
        return torch.zeros((), dtype=torch.bool, device=device)
    return ~torch.stack([norm.double() for norm in norms]).isfinite().all()


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


def _inner(optimizers: Sequence[MegatronOptimizer]) -> Iterator[torch.optim.Optimizer]:
    """Yield torch's optimizers behind Megatron's."""
    for optimizer in optimizers:
        chained = isinstance(optimizer, ChainedOptimizer)
        for part in optimizer.chained_optimizers if chained else [optimizer]:
            if part.optimizer is not None:
                yield part.optimizer
