# SPDX-License-Identifier: Apache-2.0
"""The parts of a checkpoint's state that this rank writes, and how.

Megatron-Core says which rank has which part of a tensor. The rest of its `save` is left out: it
lets torch make a plan of all shards of each tensor, in a time that grows with the square of their
number, and writes through a server process of each rank, which outlives a rank that is killed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch import Tensor

from megatron_keye.checkpoint.storage_format import (
    Shape,
    WholeTensor,
    Written,
    object_bytes,
    write_object,
    write_shard,
)


@dataclass(frozen=True)
class TensorPart:
    """A part of a tensor, to write."""

    key: str
    """Name of the whole tensor."""
    offset: Shape
    """Where the part begins in it."""
    shape: Shape
    """Shape of the part, with the stacked axes."""
    whole: WholeTensor
    """The whole tensor."""
    data: Tensor = field(repr=False)
    """Elements of the part."""


@dataclass(frozen=True)
class ObjectPart:
    """An object, to write."""

    key: str
    """Its name."""
    content: bytes = field(repr=False)
    """The object, serialized."""


Part = TensorPart | ObjectPart
_NOTHING = object_bytes(None)
"""What most linears keep beside their weight."""


def parts_of(state: dict[str, Any], rank: int, *, checks_whole: bool) -> list[Part]:
    """Return what this rank writes of a state.

    Args:
        state: Sharded tensors and objects, by group, and what is the same on all ranks.
        rank: This rank.
        checks_whole: Whether the ranks compare what they have, so that each part of a tensor is
            written once; collective then.
    """
    sharded, common = save_preprocess(state, validate_access_integrity=checks_whole)
    sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
    own = (each for each in nested_values(sharded) if is_main_replica(each.replica_id))
    return [_part(each) for each in own]


def _part(sharded: ShardedTensor | ShardedObject) -> Part:
    if isinstance(sharded, ShardedObject):
        content = _NOTHING if sharded.data is None else object_bytes(sharded.data)
        return ObjectPart(sharded.unique_key, content)
    return TensorPart(
        key=sharded.key,
        offset=tuple(sharded.global_offset),
        shape=(*(1 for _ in range(sharded.prepend_axis_num)), *sharded.local_shape),
        whole=WholeTensor(tuple(sharded.global_shape), sharded.dtype),
        data=sharded.data,
    )


def write_parts(stream: BinaryIO, parts: Iterable[Part]) -> list[Written]:
    """Write parts of a state into a file, and return where they lie in it."""
    return list(_write(stream, parts))


def _write(stream: BinaryIO, parts: Iterable[Part]) -> Iterator[Written]:
    for part in parts:
        if isinstance(part, TensorPart):
            yield write_shard(stream, part.key, part.offset, part.shape, part.data)
        else:
            yield write_object(stream, part.key, part.content)


def whole_tensors(parts: Iterable[Part]) -> dict[str, WholeTensor]:
    """Return the whole tensors that some parts belong to, by name."""
    return {part.key: part.whole for part in parts if isinstance(part, TensorPart)}
