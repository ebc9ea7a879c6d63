# SPDX-License-Identifier: Apache-2.0
"""Lists the degrees of parallelism with which a run can use so many GPUs."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_keye.config.parallel import DecoderParallel, ParallelConfig, Placement
from megatron_keye.config.run import RunConfig

_MOST_VISION_SHARE = 0.5
"""No more than this share of the GPUs are vision's own."""


def grids(run: RunConfig, num_gpus: int) -> Iterator[ParallelConfig]:
    """Yield every grid of exactly so many ranks, with vision colocated or on ranks of its own.

    Stages have equal numbers of layers. The rows of a step stay as they are.

    Args:
        run: Sizes and rows; its degrees do not count.
        num_gpus: Ranks, one a GPU.
    """
    # Layouts are compared as dedicated or colocated; ends that are shared are a choice after it.
    unshared = replace(run.parallel.vision, shared_micro_batches=0)
    for num_vision in range(int(num_gpus * _MOST_VISION_SHARE) + 1):
        placement: Placement = "dedicated" if num_vision else "colocated"
        vision = replace(unshared, placement=placement, num_ranks=num_vision)
        for decoder in _decoder_grids(run, num_gpus - num_vision):
            yield ParallelConfig(decoder=decoder, vision=vision)


def has_grid(run: RunConfig, num_gpus: int) -> bool:
    """Return whether a run can be divided over so many GPUs, whatever their memory."""
    return any(_lowest(num_gpus) <= size <= num_gpus for size in _decoder_sizes(run))


def nearest(run: RunConfig, num_gpus: int) -> list[int]:
    """Return the next lower and the next higher number of GPUs over which it can be divided."""
    sizes = _decoder_sizes(run)
    # A decoder of so many ranks may have up to as many vision ranks beside it.
    lower = max((min(2 * size, num_gpus - 1) for size in sizes if size < num_gpus), default=None)
    higher = min((max(size, num_gpus + 1) for size in sizes if 2 * size > num_gpus), default=None)
    return [number for number in (lower, higher) if number is not None]


def _lowest(num_gpus: int) -> int:
    """Return the fewest ranks of the decoder beside which the others may be vision's."""
    return num_gpus - int(num_gpus * _MOST_VISION_SHARE)


def _decoder_sizes(run: RunConfig) -> set[int]:
    """Return every number of ranks that the decoder can have."""
    decoder, tokens = run.model.decoder, run.data.row_tokens
    sizes = set[int]()
    for tensor in _divisors(decoder.num_kv_heads, of=decoder.vocab_size):
        contexts = [c for c in range(1, tokens + 1) if c == 1 or tokens % (2 * c * tensor) == 0]
        for pipeline in _divisors(decoder.num_layers, of=decoder.num_layers):
            rows = run.training.rows_per_step
            sizes |= {
                tensor * pipeline * context * data
                for context in contexts
                for data in _divisors(rows, of=rows)
            }
    return sizes


def _decoder_grids(run: RunConfig, num_ranks: int) -> Iterator[DecoderParallel]:
    decoder, num_rows = run.model.decoder, run.training.rows_per_step
    for pipeline in _divisors(num_ranks, of=decoder.num_layers):
        of_stage = num_ranks // pipeline
        for tensor in _divisors(of_stage, of=decoder.num_kv_heads):
            if decoder.vocab_size % tensor:
                continue
            for data in _divisors(of_stage // tensor, of=num_rows):
                context = of_stage // tensor // data
                parts = tensor * context * (2 if context > 1 else 1)
                if run.data.row_tokens % parts:
                    continue
                layers = decoder.num_layers // pipeline
                for virtual in _virtual_stages(pipeline, layers, num_rows // data):
                    for expert in _divisors(of_stage, of=decoder.experts.num_experts):
                        yield DecoderParallel(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_stages=virtual,
                            context=context,
                            expert=expert,
                            data=data,
                        )


def _virtual_stages(pipeline: int, layers: int, num_rows: int) -> list[int]:
    """Return 1, and where the pipeline can be interleaved the divisors of a stage's layers."""
    if pipeline == 1 or num_rows % pipeline:
        return [1]
    return [number for number in range(1, layers + 1) if layers % number == 0]


def _divisors(number: int, *, of: int) -> list[int]:
    """Return the divisors that two numbers share."""
    return [each for each in range(1, min(number, of) + 1) if number % each == of % each == 0]
