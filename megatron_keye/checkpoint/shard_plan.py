"""Which parts of a checkpoint's state this rank writes, and the metadata that lists all ranks'.

Format: torch.distributed.checkpoint's, with Megatron-Core's names, which its `load` reads. Planned
here rather than by Megatron's `save`, which writes through a server process of each rank that
outlives a killed one, and which needs collectives after the writing too.
"""

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from megatron_keye.checkpoint.storage_format import write_tensor

Placed = dict[MetadataIndex, _StorageInfo]
"""Where each part of the state lies."""


@dataclass(frozen=True)
class Part:
    """A part of the state that this rank writes."""

    item: WriteItem
    """Its name and place in the whole."""
    data: Tensor | io.BytesIO
    """A tensor, or an object that is serialized already."""


class ShardPlan:
    """The plan of a run's saves, made at the first one: all have the same structure."""

    def __init__(self, rank: int) -> None:
        """Plan nothing yet."""
        self._rank = rank
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None

    def parts_of(self, state: dict[str, Any]) -> list[Part]:
        """Return what this rank writes. All ranks must call it; the first call is collective.

        Args:
            state: Sharded tensors and objects, by group, and what is the same on all ranks.
        """
        is_first = self._plan is None
        sharded, common = save_preprocess(state, validate_access_integrity=is_first)
        sharded["common_state"] = ShardedObject(
            "common_state", common, (1,), (0,), replica_id=self._rank
        )
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded, keep_only_main_replica=True
        )
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(
            mcore_to_pyt_state_dict(named, is_loading=False), is_coordinator=self._rank == 0
        )
        plan = planner.create_local_plan()
        if is_first:
            self._share(plan, planner)
        assert self._plan == plan, "all saves of a run have the same structure"
        return [Part(item, planner.resolve_data(item)) for item in plan.items]

    def metadata(self, placed: Iterable[Placed]) -> bytes:
        """Return the content of .metadata, on rank 0.

        Args:
            placed: What `write_parts` returned, of all ranks.
        """
        assert self._metadata is not None, "rank 0 knows the plans of all ranks"
        where = {index: info for of_rank in placed for index, info in of_rank.items()}
        return pickle.dumps(
            replace(
                self._metadata,
                storage_data=where,
                storage_meta=StorageMeta(),
                version=CURRENT_DCP_VERSION,
            )
        )

    def _share(self, plan: SavePlan, planner: MCoreSavePlanner) -> None:
        """Let rank 0 make the metadata of all ranks' plans."""
        plans: list[SavePlan] | None = None
        if self._rank == 0:
            plans = [SavePlan([])] * dist.get_world_size()
        dist.gather_object(plan, plans)
        if plans is not None:
            _, self._metadata = planner.create_global_plan(plans)
        self._plan = plan


def file_of(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"__{rank}_0.distcp"


def write_parts(stream: BinaryIO, name: str, parts: Iterable[Part]) -> Placed:
    """Write parts of the state into a stream.

    Args:
        stream: The file.
        name: Its name.
        parts: What to write.
    """
    placed: Placed = {}
    for part in parts:
        if isinstance(part.data, torch.Tensor):
            start, size_bytes = write_tensor(stream, part.data)
        else:
            start, size_bytes = stream.tell(), part.data.getbuffer().nbytes
            stream.write(part.data.getbuffer())
        placed[part.item.index] = _StorageInfo(name, start, size_bytes)
    return placed
