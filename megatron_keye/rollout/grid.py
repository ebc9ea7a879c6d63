# SPDX-License-Identifier: Apache-2.0
"""The grid on which a run's model generates: without pipeline stages and context ranks.

With few new tokens at once, pipeline stages would wait for each other, and one token cannot be
split over context ranks. Such ranks become replicas, with the experts spread over them.
"""

from dataclasses import replace

from megatron_keye.config.check import check
from megatron_keye.config.parallel import DecoderParallel
from megatron_keye.config.run import RunConfig


def generating_run(run: RunConfig, num_ranks: int) -> RunConfig:
    """Return the run as it generates; nothing learns in it.

    Args:
        run: The run as it trains.
        num_ranks: Ranks that generate.

    Raises:
        UserError: When the degrees do not fit the number of ranks, or CUDA graphs.
    """
    trained, rollout, vision = run.parallel.decoder, run.rollout, run.parallel.vision
    tensor = rollout.tensor or trained.tensor
    data = max(1, (num_ranks - vision.num_ranks) // tensor)
    decoder = DecoderParallel(tensor=tensor, expert=rollout.expert or trained.expert, data=data)
    generating = replace(
        run,
        # Features of a cache belong to other weights; damage has to be reported, not counted.
        data=replace(run.data, feature_cache="", on_bad_sample="refuse", validation=""),
        # One micro-batch has no ends to share.
        parallel=replace(
            run.parallel, decoder=decoder, vision=replace(vision, shared_micro_batches=0)
        ),
        training=replace(
            run.training,
            rows_per_step=data,
            dense_up_to=0,
            records_timeline=False,
            optimizer=replace(run.training.optimizer, distributed=False),
            validation=replace(run.training.validation, patience=0),
        ),
    )
    generating.check_num_ranks(num_ranks)
    _check_graphs(generating)
    return generating


def _check_graphs(generating: RunConfig) -> None:
    """Refuse CUDA graphs of layers whose ranks tell each other on the host how much they send."""
    degrees, phase = generating.parallel.decoder, generating.training.phase
    known: list[tuple[str, object, object]] = [
        ("rollout.tensor", degrees.tensor, 1),
        ("rollout.expert", degrees.expert, 1),
        ("training.phase", phase, "sparse"),
    ]
    for name, value, expected in known:
        is_possible = value == expected or not generating.rollout.uses_cuda_graphs
        wanted = f"{expected!r} with rollout.uses_cuda_graphs=true; set it, or that to false"
        check(is_possible, name, value, wanted)
