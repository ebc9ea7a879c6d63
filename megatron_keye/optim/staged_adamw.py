# SPDX-License-Identifier: Apache-2.0
"""AdamW whose state lies in main memory or in a lower precision than it computes in.

The state passes through float32 rooms on the device, some weights at a time: copies in and out run
beside the update. So no processor has to compute, and an update is the same wherever its state is.
Megatron's own offloading (HybridDeviceOptimizer) computes on the processors, keeps all gradients
in main memory too, and makes an optimizer of each weight; its lower precision needs Transformer
Engine and cannot be combined with it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_keye.config.optimizer import OptimizerConfig
from megatron_keye.optim.pinned_memory import host_memory
from megatron_keye.optim.staging import Kept, Room, State, copy_pairs, pass_through

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NUM_ROOMS = 3
_ROOM_ELEMENTS = 1 << 24
"""Weights in one room: 192 MiB of masters and moments."""

Group = dict[str, Any]
"""One of Megatron's groups of weights with the same rate and decay."""


@dataclass(frozen=True)
class _Piece(Kept):
    """Some elements of a weight: [elements] each."""

    weight: Tensor
    gradient: Tensor
    group: Group


class StagedAdamW:
    """Stands where Megatron's optimizer has one of torch's.

    It is none of torch's: these refuse views of weights, which is what Megatron gives them.
    """

    def __init__(
        self,
        groups: list[Group],
        settings: OptimizerConfig,
        *,
        room_elements: int = _ROOM_ELEMENTS,
    ) -> None:
        """Make moments of 0, and masters of rounded weights.

        Args:
            groups: Flat shards of weights on one device, with their rate and decay.
            settings: How and where state is kept.
            room_elements: Most elements of weights that are updated at once.

        Raises:
            RuntimeError: When the main memory does not suffice.
        """
        self.param_groups = groups
        self.state: dict[Tensor, State] = {}
        weights = [weight for group in groups for weight in group["params"]]
        self._is_away: dict[Tensor, bool] = dict(
            zip(weights, _share_of(weights, settings.offload), strict=True)
        )
        # A rank may have no part of the few weights that learn.
        self._device = weights[0].device if weights else torch.device("cpu")
        self._kinds = dict.fromkeys(MOMENTS, _DTYPES[settings.moments])
        if any(weight.dtype != torch.float32 for weight in weights):
            self._kinds[MASTER] = torch.float32
        num_elements = sum(weight.numel() for weight in weights)
        self._room_elements = min(room_elements, num_elements)
        self._make_state(weights)

    def is_away(self, weight: Tensor) -> bool:
        """Return whether the state of a shard lies in main memory."""
        return self._is_away[weight]

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights by their `decoupled_grad`, and wait until their state is stored."""
        copies = any(self._is_away.values())
        rooms = [
            Room(self._kinds, self._room_elements, self._device, copies=copies)
            for _ in range(_NUM_ROOMS)
        ]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        pass_through(self._batches(), rooms, _update)

    @torch.no_grad()
    def _make_state(self, weights: list[Tensor]) -> None:
        like = {weight: self._like(weight) for weight in weights}
        away = [each for w in weights if self._is_away[w] for each in like[w].values()]
        host = iter(host_memory(away, is_pinned=self._device.type == "cuda"))
        for weight in weights:
            self.state[weight] = {
                kind: next(host)
                if self._is_away[weight]
                else torch.zeros_like(each, device=self._device)
                for kind, each in like[weight].items()
            }
            if MASTER in self.state[weight]:
                self.state[weight][MASTER].copy_(weight)

    def _like(self, weight: Tensor) -> State:
        """Return shapes and types of a shard's state, without memory."""
        kinds = MOMENTS if weight.dtype == torch.float32 else tuple(self._kinds)
        return {k: torch.empty_like(weight, dtype=self._kinds[k], device="meta") for k in kinds}

    def _batches(self) -> Iterator[list[_Piece]]:
        """Yield pieces of one group that fit into one room."""
        waiting: list[_Piece] = []
        room = 0
        for piece in self._pieces():
            is_of_group = bool(waiting) and waiting[0].group is piece.group
            if waiting and not (is_of_group and len(piece.weight) <= room):
                yield waiting
                waiting = []
            room = (room if waiting else self._room_elements) - len(piece.weight)
            waiting.append(piece)
        if waiting:
            yield waiting

    def _pieces(self) -> Iterator[_Piece]:
        for group in self.param_groups:
            for weight in group["params"]:
                state, gradient = self.state[weight], gradient_of(weight)
                if gradient is None:
                    continue
                parts = (weight.detach(), gradient, *state.values())
                cut = [part.flatten().split(self._room_elements) for part in parts]
                for values, slope, *kept in zip(*cut, strict=True):
                    yield _Piece(
                        state=dict(zip(state, kept, strict=True)),
                        is_away=self._is_away[weight],
                        weight=values,
                        gradient=slope,
                        group=group,
                    )


def stage_state(optimizer: MegatronOptimizer, settings: OptimizerConfig) -> None:
    """Put a staged AdamW in the place of the one that Megatron made, which has no state yet."""
    if optimizer.optimizer is not None:
        optimizer.optimizer = StagedAdamW(optimizer.optimizer.param_groups, settings)


def gradient_of(weight: Tensor) -> Tensor | None:
    """Return the gradient that an optimizer of Megatron's updates a shard by."""
    # Views of weights have no .grad, and say so.
    name = "decoupled_grad" if hasattr(weight, "decoupled_grad") else "grad"
    gradient: Tensor | None = getattr(weight, name)
    return gradient


def _share_of(weights: Iterable[Tensor], share: float) -> Iterator[bool]:
    """Yield for each weight whether it belongs to a share of all elements, evenly spread."""
    seen, taken = 0, 0
    for weight in weights:
        seen += weight.numel()
        is_taken = taken + weight.numel() / 2 <= share * seen
        taken += weight.numel() * is_taken
        yield is_taken


def _update(pieces: list[_Piece], staged: list[State]) -> None:
    """Compute one update of pieces of one group, with their state in float32."""
    weights, group = [piece.weight for piece in pieces], pieces[0].group
    masters = [state.get(MASTER, weight) for weight, state in zip(weights, staged, strict=True)]
    means, squares = ([state[kind] for state in staged] for kind in MOMENTS)
    done = torch.full((len(pieces),), group["step"] - 1.0, device=weights[0].device)
    beta1, beta2 = group["betas"]
    adamw(
        masters,
        [piece.gradient.float() for piece in pieces],
        means,
        squares,
        max_exp_avg_sqs=[],
        state_steps=list(done.unbind()),
        fused=weights[0].is_cuda,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    pairs = zip(masters, weights, strict=True)
    copy_pairs([(master, weight) for master, weight in pairs if master is not weight])
