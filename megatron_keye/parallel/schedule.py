"""The order of one heterogeneous step: encode and send, decode, return, encode again backward.

What is computed is handed in, so that the order can be read, and later overlapped, in one place.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.plan import StepPlan
from megatron_keye.parallel.transport import FeatureTransport


def run_step(
    plan: StepPlan,
    grid: Grid,
    transport: FeatureTransport,
    *,
    encode: Callable[[int], Tensor],
    decode: Callable[[], None],
    encode_backward: Callable[[int, Tensor], None],
    returns_gradients: bool,
) -> None:
    """Run this rank's share of a step.

    Vision ranks keep no activations between the two passes: `encode_backward` computes the chunk
    again. Decoder ranks send a micro-batch's gradients as soon as its backward pass is done, from
    within `decode`.

    Args:
        plan: The step's plan.
        grid: Tells whether this rank encodes, decodes or both.
        transport: The step's messages.
        encode: From a chunk's index to its features [M, D], without gradients.
        decode: Runs the decoder's pipeline schedule, forward and backward.
        encode_backward: Takes a chunk's index and the gradient [M, D] of its features.
        returns_gradients: Whether anything in front of the decoder learns.
    """
    if grid.rank not in grid.transport_ranks:
        decode()
        return
    mine = plan.chunks_of(grid.rank) if grid.vision is not None else []
    for chunk in mine:
        transport.send_features(chunk, encode(chunk))
    if grid.vision is not None:
        transport.finish_features()
    if grid.decoder is not None:
        decode()
        transport.finish_features()
    if returns_gradients:
        transport.finish_gradients()
        for chunk in mine:
            num_tokens = sum(picture.num_tokens for picture in plan.chunks[chunk].pictures)
            encode_backward(chunk, transport.take_gradients(chunk, num_tokens))
    transport.assert_done(gradients_returned=returns_gradients)
