"""In which order a step's passes run and its messages travel: one order, known to every rank.

Apart from the plan because it depends only on degrees and on the number of micro-batches, and
because the simulator plays the same order.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from megatron_keye.config.parallel import DecoderParallel, ParallelConfig

_ENOUGH_AHEAD = 2
"""Micro-batches whose features wait for the decoder before a vision rank turns to gradients: one
that the decoder takes next, one for while a gradient is worked on."""


@dataclass(frozen=True)
class Pass:
    """One virtual stage at work on one micro-batch."""

    is_forward: bool
    """Forward, or backward."""
    virtual_stage: int
    """Number of the virtual stage within its pipeline stage."""
    micro_batch: int
    """The micro-batch."""


@dataclass(frozen=True)
class Exchange:
    """One all-to-all between all transport ranks."""

    kind: Literal["features", "gradients"]
    """Features travel to the decoder, their gradients back."""
    micro_batch: int
    """The micro-batch that they belong to."""


def pipeline_order(degrees: DecoderParallel, num_micro_batches: int, stage: int) -> list[Pass]:
    """Return the passes of one stage in the order in which Megatron's schedules run them.

    Args:
        degrees: Stages, and virtual stages of each.
        num_micro_batches: Micro-batches of a replica; a multiple of the stages when interleaved.
        stage: The stage.

    Returns:
        Warm-up forwards, then a forward and a backward in turn (1F1B), then backwards.
    """
    stages, parts = degrees.pipeline, degrees.virtual_stages
    if parts == 1:
        forwards = [(0, m) for m in range(num_micro_batches)]
        num_warmup = stages - stage - 1
    else:
        # As many micro-batches as there are stages pass one virtual stage before the next one.
        forwards = [
            (part, m)
            for first in range(0, num_micro_batches, stages)
            for part in range(parts)
            for m in range(first, min(first + stages, num_micro_batches))
        ]
        num_warmup = 2 * (stages - stage - 1) + (parts - 1) * stages
    backwards = [Pass(False, parts - 1 - part, m) for part, m in forwards]
    passes = [Pass(True, part, m) for part, m in forwards]
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
    """Return all exchanges of a step in the order in which every transport rank starts them.

    It cannot deadlock. A rank starts an exchange only after those before it, and no rank waits
    for one that stands later than what it has still to start:

    - dedicated: the order is that of the first stage's own passes. Vision ranks start an exchange
      of features when they have encoded their part, which needs no message, and one of gradients
      at once. First-stage ranks start each where their schedule meets it, and until then wait for
      earlier exchanges only. By induction every exchange is started by all and ends.
    - colocated: all features, before any rank decodes; all gradients, after all have.

    Args:
        parallel: Degrees and placement.
        num_micro_batches: Micro-batches of a replica.
        with_features: Those in which any replica has pictures; the others exchange nothing.
        returns_gradients: Whether anything in front of the decoder learns.
    """
    order = [
        Exchange("features" if step.is_forward else "gradients", step.micro_batch)
        for step in pipeline_order(parallel.decoder, num_micro_batches, 0)
        if step.virtual_stage == 0 and step.micro_batch in with_features
    ]
    if not returns_gradients:
        order = [exchange for exchange in order if exchange.kind == "features"]
    if parallel.vision.placement == "colocated":
        order.sort(key=lambda exchange: exchange.kind == "gradients")
    return order


def next_work(
    *, num_to_encode: int, num_to_return: int, num_ahead: int, has_gradients: bool
) -> Literal["encode", "return", "nothing"]:
    """Decide what a vision rank of its own does next; it waits only when nothing else is left.

    Args:
        num_to_encode: Chunks that it still has to encode.
        num_to_return: Chunks whose backward it still has to run.
        num_ahead: Micro-batches whose features wait for the decoder.
        has_gradients: Whether the gradient of the next chunk to return is there.
    """
    if num_to_encode == 0:
        return "return" if num_to_return else "nothing"
    if num_to_return and has_gradients and num_ahead >= _ENOUGH_AHEAD:
        return "return"
    return "encode"
