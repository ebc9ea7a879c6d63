# SPDX-License-Identifier: Apache-2.0
"""The account of a step: what the whole job, one rank or one pass of a rank does.

Rows are described by the true lengths of their documents. Experts count as evenly routed, and
labels as evenly spread over context ranks.
"""

from collections.abc import Sequence

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account.counts import RowCounts, count_rows
from megatron_keye.estimate.account.decoder import embedding_work, layer_works, output_works
from megatron_keye.estimate.account.optimizer import optimizer_work
from megatron_keye.estimate.account.vision import PatchCounts, count_patches, vision_works
from megatron_keye.estimate.account.work import Work, add_works, total_model_flops
from megatron_keye.estimate.parameters import decoder_parameters, stage_layers, vision_parameters
from megatron_keye.plan.places import DecoderPlace, decoder_place, encoding_ranks, vision_ranks
from megatron_keye.plan.slots import RowSizes


def job_works(run: RunConfig, rows: Sequence[RowSizes]) -> list[Work]:
    """Return the works of one step, summed over all ranks.

    Args:
        run: Sizes, degrees, phase, recomputation and what learns.
        rows: Of the global batch, in the order in which replicas take turns.
    """
    degrees = run.parallel.decoder
    works = [work for row in rows for work in vision_works(run, count_patches(row.patches, run))]
    num_layers = run.model.decoder.num_layers
    for context in range(degrees.context):
        counts = count_rows(rows, run, context=context)
        whole = [work * num_layers for work in layer_works(run, counts)]
        whole += [embedding_work(run, counts), *output_works(run, counts)]
        works += [work * degrees.tensor for work in whole]
    for rank in range(run.parallel.num_ranks):
        works.append(_optimizer(run, rank))
    return add_works(works)


def rank_works(
    run: RunConfig, rows: Sequence[RowSizes], rank: int, patches: Sequence[int] | None = None
) -> list[Work]:
    """Return the works of one step on one rank.

    Args:
        run: As `job_works` takes it.
        rows: Of the global batch, in the order in which replicas take turns.
        rank: Global rank.
        patches: Patches of each picture that it encodes; None for an equal share of those
            that it encodes with others.
    """
    degrees, works = run.parallel.decoder, [_optimizer(run, rank)]
    if rank in vision_ranks(run.parallel):
        works += vision_works(run, _pictures_of_rank(run, rows, rank, patches))
    if rank < degrees.num_ranks:
        place = decoder_place(degrees, rank)
        counts = count_rows(rows[place.data :: degrees.data], run, context=place.context)
        num_layers = len(stage_layers(run, place.pipeline))
        works += [work * num_layers for work in layer_works(run, counts)]
        works += _ends(run, counts, place, 0, degrees.virtual_stages - 1)
    return add_works(works)


def pass_works(
    run: RunConfig, row: RowSizes, place: DecoderPlace, virtual_stage: int
) -> list[Work]:
    """Return the works of a row's forward and backward pass through one virtual stage of a rank.

    Args:
        run: As `job_works` takes it.
        row: The row.
        place: Of the rank.
        virtual_stage: 0-based, of the rank's pipeline stage.
    """
    degrees = run.parallel.decoder
    counts = count_rows([row], run, context=place.context)
    layers = degrees.virtual_stage_layers(
        run.model.decoder.num_layers, place.pipeline, virtual_stage
    )
    works = [work * len(layers) for work in layer_works(run, counts)]
    return add_works(works + _ends(run, counts, place, virtual_stage, virtual_stage))


def row_works(run: RunConfig, row: RowSizes) -> tuple[list[Work], list[Work]]:
    """Return the works of a row on one tensor rank, summed over context ranks.

    Args:
        run: As `job_works` takes it.
        row: The row.

    Returns:
        Of one layer, and of what follows the last one.
    """
    counts = count_rows([row], run)
    return layer_works(run, counts), output_works(run, counts)


def picture_works(run: RunConfig, patches: Sequence[int]) -> list[Work]:
    """Return the works of encoding one chunk, and of its backward pass.

    Args:
        run: As `job_works` takes it.
        patches: Patches of each of its pictures.
    """
    return add_works(vision_works(run, count_patches(patches, run, num_chunks=1)))


def model_flops(run: RunConfig, rows: Sequence[RowSizes]) -> float:
    """Return the model FLOPs of one step over all ranks, which do not depend on their grid.

    Args:
        run: Sizes, phase and what learns.
        rows: Of the global batch.
    """
    counts = count_rows(rows, run)
    layers = total_model_flops(layer_works(run, counts)) * run.model.decoder.num_layers
    patches = [count for row in rows for count in row.patches]
    vision = total_model_flops(vision_works(run, count_patches(patches, run)))
    # Tensor ranks have equal shares.
    decoder = layers + total_model_flops(output_works(run, counts))
    return decoder * run.parallel.decoder.tensor + vision


def _ends(
    run: RunConfig, counts: Sequence[RowCounts], place: DecoderPlace, first: int, last: int
) -> list[Work]:
    """Return what the virtual stages `first` to `last` of a rank do beside their layers."""
    degrees, works = run.parallel.decoder, list[Work]()
    if place.pipeline == 0 and first == 0:
        works.append(embedding_work(run, counts))
    if place.pipeline == degrees.pipeline - 1 and last == degrees.virtual_stages - 1:
        works += output_works(run, counts)
    return works


def _pictures_of_rank(
    run: RunConfig, rows: Sequence[RowSizes], rank: int, patches: Sequence[int] | None
) -> PatchCounts:
    if patches is not None:
        return count_patches(patches, run)
    parallel, data = run.parallel, run.parallel.decoder.data
    shared, num_sharing = list[int](), 1
    for number, row in enumerate(rows):
        sharing = encoding_ranks(parallel, number // data, len(rows) // data)
        if rank in sharing:
            shared += row.patches
            num_sharing = len(sharing)
    return count_patches(shared, run) * (1 / num_sharing)


def _optimizer(run: RunConfig, rank: int) -> Work:
    degrees = run.parallel.decoder
    held = vision_parameters(run) if rank in vision_ranks(run.parallel) else []
    if rank < degrees.num_ranks:
        held = held + decoder_parameters(run, decoder_place(degrees, rank).pipeline)
    return optimizer_work(run, held)
