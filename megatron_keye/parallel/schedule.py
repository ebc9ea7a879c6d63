"""The order of one heterogeneous step: encode and send, decode, return, encode again backward.

What is computed is handed in, so that the order can be read, and later overlapped, in one place.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.plan import StepPlan
from megatron_keye.parallel.transport import FeatureTransport


class Encoder(Protocol):
    """What a rank that encodes does with the chunks of a step."""

    def encode(self, chunk: int) -> Tensor:
        """Return the features [M, D] of a chunk of the plan, without gradients."""

    def backward(self, chunk: int, gradient_MD: Tensor) -> None:
        """Take the gradient [M, D] of a chunk's features."""


def run_step(
    plan: StepPlan,
    grid: Grid,
    transport: FeatureTransport,
    *,
    encoder: Encoder | None,
    decode: Callable[[], None],
    returns_gradients: bool,
) -> None:
    """Run this rank's share of a step.

    Vision ranks keep no activations between the two passes: the backward pass computes the chunk
    again. Decoder ranks send a micro-batch's gradients as soon as its backward pass is done, from
    within `decode`.

    Args:
        plan: The step's plan.
        grid: Tells whether this rank decodes and takes part in transport.
        transport: The step's messages.
        encoder: Runs chunks; None on a rank that does not encode.
        decode: Runs the decoder's pipeline schedule, forward and backward.
        returns_gradients: Whether anything in front of the decoder learns.
    """
    if grid.rank not in grid.transport_ranks:
        decode()
        return
    mine = plan.chunks_of(grid.rank)
    if encoder is not None:
        for chunk in mine:
            transport.send_features(chunk, encoder.encode(chunk))
        transport.finish_features()
    if grid.decoder is not None:
        decode()
        transport.finish_features()
    if returns_gradients:
        transport.finish_gradients()
        for chunk in mine:
            assert encoder is not None, "chunks are planned for ranks that encode"
            num_tokens = sum(picture.num_tokens for picture in plan.chunks[chunk].pictures)
            encoder.backward(chunk, transport.take_gradients(chunk, num_tokens))
    transport.finish(gradients_returned=returns_gradients)
