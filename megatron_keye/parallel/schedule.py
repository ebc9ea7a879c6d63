# SPDX-License-Identifier: Apache-2.0
"""The schedule of encoding, decoder and vision's backward in one step, on each kind of rank.

Computation is passed in, so that the order can be read in one place.
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
    """Encodes the chunks of a step."""

    def encode(self, chunk: int) -> Tensor:
        """Return the features [M, D] of a chunk of the plan, without gradients."""

    def backward(self, chunk: int, gradient_MD: Tensor) -> None:
        """Run the backward pass of a chunk, given the gradient [M, D] of its features."""

    def encode_ahead(self) -> bool:
        """Encode one more chunk of the next step if possible, and return whether it was."""


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

    Dedicated vision ranks encode ahead of the decoder, into the next step where ViT and projector
    are frozen, and run backward passes while the decoder runs; the decoder's ranks encode what is
    theirs, all or the ends of a step, before they run it, and the backward passes follow it.

    Args:
        plan: The step's plan.
        grid: This rank and its groups.
        transport: The step's exchanges.
        encoder: Encodes chunks; None on a rank that does not.
        run_decoder: Runs the decoder's pipeline schedule, forward and backward.
        returns_gradients: Whether ViT or projector is trained.
    """
    chunks = plan.chunks_of(grid.rank)
    if grid.rank not in grid.transport_ranks:
        run_decoder()
        return
    transport.start()
    if grid.decoder is None:
        assert encoder is not None, "a rank outside the decoder grid encodes"
        _encode_beside_the_decoder(chunks, transport, encoder, returns_gradients=returns_gradients)
        while transport.num_ahead() and encoder.encode_ahead():
            pass
    else:
        for chunk in chunks:
            assert encoder is not None, "chunks are planned for ranks that encode"
            transport.send_features(chunk, encoder.encode(chunk))
        run_decoder()
        transport.finish_decoder()
        for chunk in chunks if returns_gradients else []:
            assert encoder is not None, "chunks are planned for ranks that encode"
            encoder.backward(chunk, transport.take_gradients(chunk))
    transport.finish()


def _encode_beside_the_decoder(
    chunks: list[int], transport: FeatureTransport, encoder: Encoder, *, returns_gradients: bool
) -> None:
    """Interleave encoding and backward passes as gradients arrive.

    Each of the two runs in plan order, and weight gradients accumulate in that order, so that a
    step's result does not depend on timing.
    """
    to_encode, backwards = deque(chunks), deque(chunks if returns_gradients else [])
    while True:
        # A chunk that is not encoded has no gradient yet, so backward never overtakes encoding.
        work = next_work(
            num_to_encode=len(to_encode),
            num_backwards=len(backwards),
            num_ahead=transport.num_ahead(),
            has_gradients=bool(backwards) and transport.has_gradients(backwards[0]),
        )
        if work == "nothing":
            return
        if work == "encode":
            chunk = to_encode.popleft()
            transport.send_features(chunk, encoder.encode(chunk))
        else:
            chunk = backwards.popleft()
            encoder.backward(chunk, transport.take_gradients(chunk))
