# SPDX-License-Identifier: Apache-2.0
"""Work of linear layers: of some that see the same rows, with their adapters.

Forward multiplies rows by a weight. Backward multiplies the gradient of the results by the weight
where something before it learns, and by the rows where the weight does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_keye.config.lora import Target
from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account.work import Module, Passes, Precision, Work
from megatron_keye.estimate.state import BYTES, SUM_BYTES


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One weight, or several of one shape of which each row meets one."""

    inputs: float
    """Numbers of a row that it reads."""
    outputs: float
    """Numbers of a row that it writes."""
    learns: bool
    """Whether the weight has a gradient."""
    passes_gradients: bool = True
    """Whether what it reads has a gradient."""
    num_weights: int = 1
    """Weights of this shape on the rank."""
    share: float = 1.0
    """Part of the rows that this rank multiplies."""

    @property
    def flops(self) -> float:
        """FLOPs of one product for a row."""
        return 2.0 * self.share * self.inputs * self.outputs

    @property
    def num_gradients(self) -> int:
        """Products of the backward pass, each of as many FLOPs."""
        return self.learns + self.passes_gradients


def adapter_rank(run: RunConfig, target: Target) -> int:
    """Return the rank of the adapters of a group of linears, 0 without any."""
    return run.training.lora.rank if run.training.lora.is_adapting(target) else 0


def with_adapter(
    linear: Linear, rank: int, *, shares: tuple[float, float] = (1, 1)
) -> list[Linear]:
    """Return a linear and the matrices A and B of its adapter.

    Args:
        linear: The linear.
        rank: Rows of A and columns of B; 0 for no adapter.
        shares: Parts of the rows that this rank multiplies by A and by B; along the tensor axis
            the matrix on the side of the hidden states is whole and sees a part of them.
    """
    if rank == 0:
        return [linear]
    a = replace(linear, outputs=rank, learns=True, share=shares[0])
    b = replace(linear, inputs=rank, learns=True, passes_gradients=True, share=shares[1])
    return [linear, a, b]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How many rows some linears multiply on one rank."""

    real: float
    """The rank's share of the model's rows."""
    laid: float
    """All that it multiplies."""
    num_passes: float
    """Times that the weights are read."""


def linear_work(
    module: Module,
    linears: Sequence[Linear],
    rows: Rows,
    run: RunConfig,
    *,
    num_repeats: int = 0,
    precision: Precision | None = None,
) -> Work:
    """Return the work of linears that see the same rows.

    Args:
        module: What they are.
        linears: Their shapes on the rank.
        rows: Numbers of rows.
        run: Its precision.
        num_repeats: Times that the forward pass runs once more, for the backward pass.
        precision: What multiplies, where it is not the run's.
    """
    forward = sum(linear.flops for linear in linears)
    backward = sum(linear.flops * linear.num_gradients for linear in linears)
    read = sum(_forward_bytes(linear, rows, run) for linear in linears)
    return Work(
        module=module,
        precision=precision or run.training.precision,
        model_flops=Passes(forward=forward, backward=backward) * rows.real,
        executed_flops=Passes(forward=forward, backward=backward, recomputed=num_repeats * forward)
        * rows.laid,
        moved_bytes=Passes(
            forward=read,
            backward=sum(_backward_bytes(linear, rows, run) for linear in linears),
            recomputed=num_repeats * read,
        ),
    )


def _forward_bytes(linear: Linear, rows: Rows, run: RunConfig) -> float:
    """Rows are read and written; of several weights no more are read than there are rows."""
    size, num_rows = BYTES[run.training.precision], linear.share * rows.laid
    return size * (num_rows * (linear.inputs + linear.outputs) + _weights(linear, rows))


def _backward_bytes(linear: Linear, rows: Rows, run: RunConfig) -> float:
    """The gradient of the results is read once for both products, a weight's gradient written."""
    size, num_rows = BYTES[run.training.precision], linear.share * rows.laid
    moved = size * num_rows * linear.outputs if linear.num_gradients else 0.0
    if linear.passes_gradients:
        moved += size * (num_rows * linear.inputs + _weights(linear, rows))
    if linear.learns:
        moved += size * num_rows * linear.inputs
        moved += SUM_BYTES[run.training.precision] * _weights(linear, rows)
    return moved


def _weights(linear: Linear, rows: Rows) -> float:
    """Return the numbers of all weights that are read, once in each pass."""
    met = min(rows.num_passes * linear.num_weights, rows.laid)
    return met * linear.inputs * linear.outputs
