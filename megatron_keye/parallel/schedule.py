"""The order of one heterogeneous step on each kind of rank.

What is computed is handed in, so that the order can be read, and simulated, in one place.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.transport import FeatureTransport
from megatron_keye.plan.order import next_work
from megatron_keye.plan.step import StepPlan


class Encoder(Protocol):
    """What a rank that encodes does with the chunks of a step."""

    def encode(self, chunk: int) -> Tensor:
        """Return the features [M, D] of a chunk of the plan, without gradients."""

    def backward(self, chunk: int, gradient_MD: Tensor) -> None:
        """Take the gradient [M, D] of a chunk's features."""

    def encode_ahead(self) -> bool:
        """Encode one more chunk of the next step if that is possible, and tell whether it was."""


def run_step(
    plan: StepPlan,
    grid: Grid,
    transport: FeatureTransport,
    *,
    encoder: Encoder | None,
    run_decoder: Callable[[], None],
    returns_gradients: bool,
) -> None:
    """Run this rank's share of a step.

    Vision ranks keep no activations between the two passes: the backward pass computes the chunk
    again. On ranks of their own they encode ahead of the decoder, into the next step where nothing
    of theirs learns, and work on gradients while it goes on; on the decoder's ranks all is encoded
    before and all gradients are taken after.

    Args:
        plan: The step's plan.
        grid: Tells whether this rank is the decoder's and takes part in transport.
        transport: The step's messages.
        encoder: Runs chunks; None on a rank that does not encode.
        run_decoder: Runs the decoder's pipeline schedule, forward and backward.
        returns_gradients: Whether anything in front of the decoder learns.
    """
    mine = plan.chunks_of(grid.rank)
    if grid.rank not in grid.transport_ranks:
        run_decoder()
        return
    transport.start()
    if grid.decoder is None:
        assert encoder is not None, "a rank outside the decoder encodes"
        _encode_beside_the_decoder(mine, transport, encoder, returns_gradients=returns_gradients)
        while transport.num_ahead() and encoder.encode_ahead():
            pass
    else:
        for chunk in mine:
            assert encoder is not None, "chunks are planned for ranks that encode"
            transport.send_features(chunk, encoder.encode(chunk))
        run_decoder()
        transport.finish_decoder()
        for chunk in mine if returns_gradients else []:
            assert encoder is not None, "chunks are planned for ranks that encode"
            encoder.backward(chunk, transport.take_gradients(chunk))
    transport.finish()


def _encode_beside_the_decoder(
    mine: list[int], transport: FeatureTransport, encoder: Encoder, *, returns_gradients: bool
) -> None:
    """Encode and run backward by need.

    Timing decides only how the two interleave. Chunks are encoded in order, and their gradients
    are added up in order, so that a step's result does not depend on timing.
    """
    to_encode, to_return = deque(mine), deque(mine if returns_gradients else [])
    while True:
        # A chunk that is still to be encoded has no gradient; encoding keeps ahead by itself.
        work = next_work(
            num_to_encode=len(to_encode),
            num_to_return=len(to_return),
            num_ahead=transport.num_ahead(),
            has_gradients=bool(to_return) and transport.has_gradients(to_return[0]),
        )
        if work == "nothing":
            return
        if work == "encode":
            chunk = to_encode.popleft()
            transport.send_features(chunk, encoder.encode(chunk))
        else:
            chunk = to_return.popleft()
            encoder.backward(chunk, transport.take_gradients(chunk))
