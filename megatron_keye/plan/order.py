# SPDX-License-Identifier: Apache-2.0
"""The order of a step's passes and exchanges, the same on every rank.

Separate from the plan, since it needs only the degrees and the number of micro-batches.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from megatron_keye.config.parallel import DecoderParallel, ParallelConfig
from megatron_keye.plan.places import is_encoded_by_decoder

_ENOUGH_AHEAD = 2
"""Micro-batches of features to have ready for the decoder before a vision rank runs a backward
pass: the one that the decoder runs next, and one more for the duration of that pass."""


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass of one virtual stage over one micro-batch."""

    is_forward: bool
    """False for backward."""
    virtual_stage: int
    """Index of the virtual stage within its pipeline stage."""
    micro_batch: int
    """Index of the micro-batch within its replica."""


@dataclass(frozen=True)
class Exchange:
    """One all-to-all between the ranks that encode a micro-batch and those that embed it."""

    kind: Literal["features", "gradients"]
    """Features go to the decoder, their gradients back."""
    micro_batch: int
    """Index of the micro-batch that they belong to."""


def pipeline_order(degrees: DecoderParallel, num_micro_batches: int, stage: int) -> list[Pass]:
    """Return the passes of one stage in the order in which Megatron's schedules run them.

    Args:
        degrees: Stages, and virtual stages of each.
        num_micro_batches: Micro-batches of a replica; a multiple of the stages when interleaved.
        stage: 0-based pipeline stage.

    Returns:
        Warm-up forwards, then forwards and backwards in turn, then the remaining backwards: 1F1B,
        interleaved with virtual stages (Narayanan et al., arXiv:2104.04473).
    """
    num_stages, num_virtual = degrees.pipeline, degrees.virtual_stages
    if num_virtual == 1:
        forwards = [(0, m) for m in range(num_micro_batches)]
        num_warmup = num_stages - stage - 1
    else:
        # A group of num_stages micro-batches runs one virtual stage after the other.
        forwards = [
            (virtual, m)
            for first in range(0, num_micro_batches, num_stages)
            for virtual in range(num_virtual)
            for m in range(first, min(first + num_stages, num_micro_batches))
        ]
        num_warmup = 2 * (num_stages - stage - 1) + (num_virtual - 1) * num_stages
    backwards = [Pass(False, num_virtual - 1 - virtual, m) for virtual, m in forwards]
    passes = [Pass(True, virtual, m) for virtual, m in forwards]
    num_warmup = min(num_warmup, len(passes))
    order = passes[:num_warmup]
    for number, forward in enumerate(passes[num_warmup:]):
        order += [forward, backwards[number]]
    return order + backwards[len(passes) - num_warmup :]


def transport_order(
    parallel: ParallelConfig,
    num_micro_batches: int,
    with_features: Collection[int],
    *,
    returns_gradients: bool,
) -> list[Exchange]:
    """Return all exchanges of a step in the order in which every rank starts those it is part of.

    It cannot deadlock: a rank starts exchanges in this order, and never waits for one that comes
    after another which it has still to start.

    - What the decoder's ranks encode, all of it or the ends of a step: all features before any
      rank runs the decoder, all gradients after.
    - What ranks of their own encode, between these: the order is that of the first stage's passes.
      A vision rank starts an exchange of features once it has encoded its share, which needs no
      message, and one of gradients at once. A first-stage rank starts each where its schedule
      reaches it, and until then waits for earlier ones only. By induction every exchange is
      started by all its ranks and completes.

    Args:
        parallel: Degrees and placement.
        num_micro_batches: Micro-batches of a replica.
        with_features: Micro-batches in which any replica has pictures; others need no exchange.
        returns_gradients: Whether ViT or projector is trained.
    """
    order = [
        Exchange("features" if step.is_forward else "gradients", step.micro_batch)
        for step in pipeline_order(parallel.decoder, num_micro_batches, 0)
        if step.virtual_stage == 0 and step.micro_batch in with_features
    ]
    if not returns_gradients:
        order = [exchange for exchange in order if exchange.kind == "features"]
    around, beside = list[Exchange](), list[Exchange]()
    for exchange in order:
        is_shared = is_encoded_by_decoder(parallel.vision, exchange.micro_batch, num_micro_batches)
        (around if is_shared else beside).append(exchange)
    before, after = (
        [exchange for exchange in around if exchange.kind == kind]
        for kind in ("features", "gradients")
    )
    return before + beside + after


def next_work(
    *, num_to_encode: int, num_backwards: int, num_ahead: int, has_gradients: bool
) -> Literal["encode", "backward", "nothing"]:
    """Decide what a dedicated vision rank does next; it waits only when nothing else is left.

    Args:
        num_to_encode: Chunks still to be encoded.
        num_backwards: Chunks whose backward pass is still to run.
        num_ahead: Micro-batches whose features the decoder has not received yet.
        has_gradients: Whether the gradient for the next backward pass has arrived.
    """
    if num_to_encode == 0:
        return "backward" if num_backwards else "nothing"
    if num_backwards and has_gradients and num_ahead >= _ENOUGH_AHEAD:
        return "backward"
    return "encode"
