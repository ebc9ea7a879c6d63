# SPDX-License-Identifier: Apache-2.0
"""Estimates the memory of what a run keeps: weights, gradients and the optimizer's state.

On the device and in main memory. Standard library and numpy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_keye.config.parts import Part
from megatron_keye.config.run import RunConfig
from megatron_keye.plan.places import vision_ranks

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of a number, by precision."""
_MASTER = 4
"""Bytes per parameter of the master weight in bf16."""
SUM_BYTES = {"bf16": 4, "fp32": 4, "fp64": 8}
"""Bytes per parameter of the gradients that micro-batches add up, by precision."""
_ROOMS, _ROOM_PARAMETERS = 3, 2**24
"""Rooms of the update through which an optimizer's state passes (optim/staged_adamw.py)."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of one kind on one rank."""

    part: Part
    """Part of the model."""
    is_expert: bool
    """Whether they are split over the expert axis."""
    count: int
    """Elements on this rank."""
    is_adapter: bool = False
    """Whether they are low-rank adapters beside the part's weights."""


def state_bytes(run: RunConfig, held: Sequence[Parameters]) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer on one rank's device.

    Args:
        run: Precision, degrees and what learns.
        held: Parameters on the rank.
    """
    size = BYTES[run.training.precision]
    return {
        "weights": size * sum(each.count for each in held),
        "gradients": SUM_BYTES[run.training.precision] * num_trained(run, held),
        "optimizer": (1 - run.training.optimizer.offload) * optimizer_bytes(run, held),
    }


def optimizer_bytes(run: RunConfig, held: Sequence[Parameters]) -> float:
    """Return the bytes of one rank's moments and master weights, wherever they are.

    Args:
        run: Precision, degrees and what learns.
        held: Parameters on the rank.
    """
    return sum(_state_sizes(run)) * num_owned(run, held)


def num_trained(run: RunConfig, held: Sequence[Parameters]) -> int:
    """Return how many of a rank's parameters learn."""
    return sum(each.count for each in _trained(run, held))


def num_owned(run: RunConfig, held: Sequence[Parameters]) -> float:
    """Return how many of them a rank updates, of which it has the optimizer's state."""
    return sum(each.count / _sharers(run, each) for each in _trained(run, held))


def host_bytes(run: RunConfig, held: Sequence[Parameters]) -> float:
    """Return the bytes of one rank's optimizer that are kept in main memory.

    Args:
        run: Precision, degrees and what learns.
        held: Parameters on the rank.
    """
    return run.training.optimizer.offload * optimizer_bytes(run, held)


def brief_bytes(run: RunConfig, held: Sequence[Parameters]) -> float:
    """Return the bytes of one rank's device that are taken when there are no activations.

    While the model is built, weights that learn are copied into the buffer of their kind, and the
    optimizer's state is not there yet. The update needs its rooms.

    Args:
        run: Precision, degrees and what learns.
        held: Parameters on the rank.
    """
    if not run.training.distributes_optimizer:
        return 0.0
    trained, state = _trained(run, held), state_bytes(run, held)
    kinds = [
        sum(each.count for each in trained if each.is_expert == is_expert)
        for is_expert in (False, True)
    ]
    copied = BYTES[run.training.precision] * max(kinds)
    return max(copied - state["optimizer"], _room_bytes(run, held))


def _trained(run: RunConfig, held: Sequence[Parameters]) -> list[Parameters]:
    is_trained = run.training.is_trained
    return [each for each in held if is_trained(each.part, is_adapter=each.is_adapter)]


def _state_sizes(run: RunConfig) -> tuple[int, ...]:
    """Return the bytes per parameter of both moments and, if it is rounded, the master weight."""
    size, is_bf16 = BYTES[run.training.precision], run.training.precision == "bf16"
    moment = 4 if is_bf16 else size
    if run.training.optimizer.moments == "bf16":
        moment = 2
    return (moment, moment, _MASTER) if is_bf16 else (moment, moment)


def _sharers(run: RunConfig, held: Parameters) -> int:
    """Return the number of ranks that share the optimizer of these parameters."""
    degrees = run.parallel.decoder
    if not run.training.distributes_optimizer:
        return 1
    if held.part in ("vision", "projector"):
        return len(vision_ranks(run.parallel))
    replicas = degrees.context * degrees.data
    return replicas * degrees.tensor // degrees.expert if held.is_expert else replicas


def _room_bytes(run: RunConfig, held: Sequence[Parameters]) -> float:
    """Return the bytes of the rooms in which state is float32 during the update."""
    optimizer = run.training.optimizer
    if not optimizer.is_staged:
        return 0.0
    copied = sum(_state_sizes(run)) if optimizer.offload else 0
    cast = 8 if optimizer.moments == "bf16" else 0
    return _ROOMS * (copied + cast) * min(_ROOM_PARAMETERS, num_owned(run, held))
