# SPDX-License-Identifier: Apache-2.0
"""Gathers the tokens [S/CP] of context-parallel ranks into a row [S], in row order.

Queries stay local; keys and values are gathered, so that each rank selects among all keys of its
queries without a merge. `plan.places.owned_positions` defines which tokens a rank holds. Documents
may straddle ranks: attention is masked by row positions, so packing pads no document.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.plan.places import owned_positions


def gathered_order(row_tokens: int, num_ranks: int) -> Tensor:
    """Return the index of each of the S = row_tokens positions in all ranks' parts together.

    Returns:
        int64 [S], so that gathered[order] is in row order.
    """
    ranks = range(num_ranks)
    owned = np.concatenate([owned_positions(row_tokens, num_ranks, rank) for rank in ranks])
    return torch.from_numpy(owned).argsort()


@dataclass
class _Pending:
    """An exchange under way, and the tensor that it sends, which must live until it is done."""

    work: dist.Work | None = None
    sent: Tensor | None = None

    def wait(self) -> None:
        """Let what follows on this device run after the exchange."""
        assert self.work is not None, "the exchange was started"
        self.work.wait()
        self.work = self.sent = None


class RowGather:
    """A gather of all ranks' tokens along the context axis, under which other work runs.

    The backward pass is a reduce-scatter, likewise in two halves. It starts when the gradients of
    the rows are there, and is waited for where this object was made: autograd runs what was made
    later first, so all work that was called after this object, as far as its gradients are there,
    hides it. Hence make it early, start it when its place in the order of exchanges has come, and
    take the rows late. All ranks of the group must start theirs in one order.

    Several tensors are one message: where a GPU has one queue of work (CUDA_DEVICE_MAX_CONNECTIONS
    is 1), a second message would hold up all work behind it until the first has arrived.
    """

    def __init__(self, *local: Tensor, order_S: Tensor, group: dist.ProcessGroup) -> None:
        """Prepare the gather.

        Args:
            local: [S/CP, ...], this rank's tokens in the order of `owned_positions`; several
                tensors have one shape and type.
            order_S: From `gathered_order`, on the device of the tokens.
            group: The context axis.
        """
        self._order_S, self._group = order_S, group
        self._gather, self._scatter = _Pending(), _Pending()
        self._gathered: Tensor | None = None
        self._local: tuple[Tensor, ...] = ()
        self._rows: tuple[Tensor, ...] = local
        if group.size() > 1:
            self._local, self._rows = _AwaitGradients.apply(self._scatter, *local), ()

    def start(self) -> None:
        """Begin to send this rank's tokens, and to receive the others'."""
        if not self._local:
            return
        message = torch.cat([local.detach() for local in self._local])
        num_ranks = self._group.size()
        self._gathered = message.new_empty(num_ranks * len(message), *message.shape[1:])
        self._gather.sent = message
        self._gather.work = dist.all_gather_into_tensor(
            self._gathered, message, group=self._group, async_op=True
        )

    def rows(self) -> tuple[Tensor, ...]:
        """Return the whole rows [S, ...], after `start`; the first call waits for them."""
        if not self._rows:
            self._gather.wait()
            self._rows = _OrderRows.apply(
                self._gathered, self._order_S, self._group, self._scatter, *self._local
            )
            # Else autograd's graph would hold itself.
            self._local, self._gathered = (), None
        return self._rows


class _AwaitGradients(torch.autograd.Function):
    """Hands on the local tokens; its backward pass waits until their gradients have arrived."""

    @staticmethod
    def forward(ctx: Any, scatter: _Pending, *local: Tensor) -> tuple[Tensor, ...]:
        ctx.scatter = scatter
        return tuple(each.view_as(each) for each in local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dlocal: Tensor) -> tuple[Tensor | None, ...]:
        ctx.scatter.wait()
        return None, *dlocal


class _OrderRows(torch.autograd.Function):
    """Puts the gathered tokens in row order; its backward pass starts the reduce-scatter.

    For autograd rows are made of the local tokens, whose gradients it returns before they arrive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gathered: Tensor,
        order_S: Tensor,
        group: dist.ProcessGroup,
        scatter: _Pending,
        *local: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.places, ctx.group, ctx.scatter = _places(order_S, local), group, scatter
        return tuple(gathered.index_select(0, place_S) for place_S in ctx.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *drows: Tensor) -> tuple[Tensor | None, ...]:
        num_tokens, *shape = drows[0].shape
        dgathered = drows[0].new_empty(len(drows) * num_tokens, *shape)
        for drow, place_S in zip(drows, ctx.places, strict=True):
            dgathered.index_copy_(0, place_S, drow)
        dlocal = dgathered.new_empty(len(dgathered) // ctx.group.size(), *shape)
        ctx.scatter.sent = dgathered
        ctx.scatter.work = dist.reduce_scatter_tensor(
            dlocal, dgathered, group=ctx.group, async_op=True
        )
        return None, None, None, None, *dlocal.chunk(len(drows))


def _places(order_S: Tensor, local: tuple[Tensor, ...]) -> list[Tensor]:
    """Return where each tensor's row is in all ranks' messages together, int64 [S] each."""
    if len(local) == 1:
        return [order_S]
    num_local = len(local[0])
    begin_S = order_S + (len(local) - 1) * num_local * (order_S // num_local)
    return [begin_S + number * num_local for number in range(len(local))]
