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

    The backward pass is a reduce-scatter, likewise in two halves. It starts when the gradient of
    the row is there, and is waited for where this object was made: autograd runs what was made
    later first, so all work that was called after this object, as far as its gradients are there,
    hides it. Hence make it early, start it when its place in the order of exchanges has come, and
    take the row late. All ranks of the group must start theirs in one order.
    """

    def __init__(self, local: Tensor, order_S: Tensor, group: dist.ProcessGroup) -> None:
        """Prepare the gather.

        Args:
            local: [S/CP, ...], this rank's tokens in the order of `owned_positions`.
            order_S: From `gathered_order`, on the device of `local`.
            group: The context axis.
        """
        self._order_S, self._group = order_S, group
        self._gather, self._scatter = _Pending(), _Pending()
        self._gathered: Tensor | None = None
        self._local: Tensor | None = None
        self._row: Tensor | None = local
        if group.size() > 1:
            self._local, self._row = _AwaitGradient.apply(local, self._scatter), None

    def start(self) -> None:
        """Begin to send this rank's tokens, and to receive the others'."""
        if self._local is None:
            return
        local = self._local.detach().contiguous()
        self._gathered = local.new_empty(len(self._order_S), *local.shape[1:])
        self._gather.sent = local
        self._gather.work = dist.all_gather_into_tensor(
            self._gathered, local, group=self._group, async_op=True
        )

    def row(self) -> Tensor:
        """Return the whole row [S, ...], after `start`; the first call waits for it."""
        if self._row is None:
            self._gather.wait()
            self._row = _OrderRow.apply(
                self._local, self._gathered, self._order_S, self._group, self._scatter
            )
            # Else autograd's graph would hold itself.
            self._local = self._gathered = None
        return self._row


class _AwaitGradient(torch.autograd.Function):
    """Hands on the local tokens; its backward pass waits until their gradient has arrived."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, scatter: _Pending) -> Tensor:
        ctx.scatter = scatter
        return local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlocal: Tensor) -> tuple[Tensor, None]:
        ctx.scatter.wait()
        return dlocal, None


class _OrderRow(torch.autograd.Function):
    """Puts the gathered tokens in row order; its backward pass starts the reduce-scatter.

    For autograd the row is made of the local tokens, whose gradient it returns before it is there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        gathered: Tensor,
        order_S: Tensor,
        group: dist.ProcessGroup,
        scatter: _Pending,
    ) -> Tensor:
        ctx.order_S, ctx.group, ctx.scatter = order_S, group, scatter
        return gathered.index_select(0, order_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drow: Tensor) -> tuple[Tensor | None, ...]:
        dgathered = drow.new_empty(drow.shape).index_copy_(0, ctx.order_S, drow)
        dlocal = drow.new_empty(len(drow) // ctx.group.size(), *drow.shape[1:])
        ctx.scatter.sent = dgathered
        ctx.scatter.work = dist.reduce_scatter_tensor(
            dlocal, dgathered, group=ctx.group, async_op=True
        )
        return dlocal, None, None, None, None
