# SPDX-License-Identifier: Apache-2.0
"""Makes the process groups of the decoder grid and of the vision grid.

No other file makes groups; functions get the groups that they use as arguments. `plan/places.py`
numbers the ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_keye.config.parallel import DecoderParallel, ParallelConfig
from megatron_keye.parallel.process import group_timeout
from megatron_keye.plan.places import (
    DecoderPlace,
    decoder_place,
    exchange_ranks,
    transport_ranks,
    vision_ranks,
)


@dataclass(frozen=True)
class ExchangeGroup:
    """Ranks that exchange the features of a micro-batch.

    One for both directions; all exchanges of a step have one order (`plan/order.py`).
    """

    ranks: tuple[int, ...]
    """Global ranks, ascending."""
    group: dist.ProcessGroup
    """Their process group."""


@dataclass(frozen=True)
class Grid:
    """This rank and its process groups in both grids."""

    parallel: ParallelConfig
    """Degrees and placement."""
    rank: int
    """Global rank of this process."""
    decoder: ProcessGroupCollection | None
    """This rank's groups in the decoder grid; None on a dedicated vision rank."""
    vision: ProcessGroupCollection | None
    """This rank's groups in the vision grid; None on a rank that does not encode."""
    transport_ranks: tuple[int, ...]
    """Ranks that exchange features, ascending: those that encode or hold embeddings."""
    around: ExchangeGroup | None
    """Exchanges what the decoder's ranks encode around the decoder; None where they do not."""
    beside: ExchangeGroup | None
    """Exchanges what vision ranks encode beside the decoder; None without such ranks."""

    @property
    def vision_ranks(self) -> range:
        """The ranks that encode."""
        return vision_ranks(self.parallel)

    def place(self) -> DecoderPlace:
        """Return this rank's coordinates in the decoder grid."""
        return decoder_place(self.parallel.decoder, self.rank)


def build_grid(parallel: ParallelConfig) -> Grid:
    """Make every process group of the job. All ranks must call it, after `process.join`.

    All wait as long for a rank as the group of all ranks does.

    Args:
        parallel: Degrees of as many ranks as the job has (RunConfig.check_num_ranks).

    Returns:
        This rank's groups.
    """
    # Sequence-parallel linear layers use this global buffer, which otherwise only
    # initialize_model_parallel makes.
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    rank, encoding = dist.get_rank(), vision_ranks(parallel)
    decoder = _decoder_groups(parallel.decoder)
    vision = _vision_groups(len(encoding), encoding.start)
    return Grid(
        parallel=parallel,
        rank=rank,
        decoder=decoder if rank < parallel.decoder.num_ranks else None,
        vision=vision if rank in encoding else None,
        transport_ranks=tuple(transport_ranks(parallel)),
        around=(
            _exchange_group(exchange_ranks(parallel, encoded_by_decoder=True))
            if parallel.vision.decoder_encodes
            else None
        ),
        beside=(
            _exchange_group(exchange_ranks(parallel, encoded_by_decoder=False))
            if parallel.vision.num_ranks
            else None
        ),
    )


def _exchange_group(ranks: list[int]) -> ExchangeGroup:
    """Make a group and connect all its ranks by a first all-to-all.

    NCCL connects two ranks at their first message and blocks both until then; within a step one of
    them may be waiting for another message.
    """
    group: dist.ProcessGroup = dist.new_group(
        ranks, timeout=group_timeout(), pg_options=_transport_options()
    )
    if dist.get_rank() in ranks:
        message = torch.zeros(len(ranks), device=torch.cuda.current_device())
        dist.all_to_all_single(torch.empty_like(message), message, group=group)
    return ExchangeGroup(ranks=tuple(ranks), group=group)


def _transport_options() -> Any:
    """Return options that limit the blocks of NCCL's kernels, None for gloo.

    A vision rank starts an exchange long before the decoder reaches it, and until then NCCL's
    kernel spins on multiprocessors that encoding could use. Eight blocks still move a row's
    features in milliseconds.
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = 8
    return options


def _decoder_groups(degrees: DecoderParallel) -> ProcessGroupCollection:
    """Make the decoder's groups: of its axes, and of a view with an expert axis instead."""
    grid = HyperCommGrid(
        [degrees.tensor, degrees.context, degrees.data, degrees.pipeline],
        ["tp", "cp", "dp", "pp"],
    )
    stage_size = degrees.tensor * degrees.context * degrees.data
    grid.register_view(
        "experts",
        [1, degrees.expert, stage_size // degrees.expert, degrees.pipeline],
        ["expt_tp", "ep", "expt_dp", "pp"],
        shared_dims=["pp"],
    )
    axes = {
        "tp": "tp",
        "cp": "cp",
        "dp": "dp",
        "pp": "pp",
        "mp": ["tp", "pp"],
        "tp_cp": ["tp", "cp"],
        "dp_cp": ["cp", "dp"],
        "tp_dp_cp": ["tp", "cp", "dp"],
        "intra_dist_opt": ["tp", "cp", "dp", "pp"],
    }
    expert_axes = {
        "ep": "ep",
        "expt_tp": "expt_tp",
        "expt_dp": "expt_dp",
        "tp_ep": ["expt_tp", "ep"],
        "tp_ep_pp": ["expt_tp", "ep", "pp"],
    }
    timeout = group_timeout()
    groups = {name: grid.create_pg(of, timeout=timeout) for name, of in axes.items()} | {
        name: grid.create_pg(of, view="experts", timeout=timeout)
        for name, of in expert_axes.items()
    }
    return _collection(groups)


def _vision_groups(size: int, offset: int) -> ProcessGroupCollection:
    """Make the vision grid's groups: data parallel over all its ranks, no other axis."""
    grid = HyperCommGrid([1, size], ["tp", "dp"], rank_offset=offset)
    timeout = group_timeout()
    alone = grid.create_pg("tp", timeout=timeout)
    everyone = grid.create_pg("dp", timeout=timeout)
    names = ("tp", "cp", "pp", "mp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp")
    groups = dict.fromkeys(names, alone)
    groups |= dict.fromkeys(("dp", "dp_cp", "tp_dp_cp", "expt_dp", "intra_dist_opt"), everyone)
    return _collection(groups)


def _collection(groups: dict[str, dist.ProcessGroup]) -> ProcessGroupCollection:
    """Name the groups as Megatron does, with those that coincide without weight gathering."""
    return ProcessGroupCollection(
        **groups,
        dp_cp_gtp_remat=groups["dp_cp"],
        expt_dp_gtp_remat=groups["expt_dp"],
        tp_ep_pp_with_egtp_remat=groups["tp_ep_pp"],
        intra_dp_cp=groups["dp_cp"],
        intra_expt_dp=groups["expt_dp"],
        # Embedding and output layer are untied, so no group reduces their gradients.
        embd=None,
        pos_embd=None,
    )
