# SPDX-License-Identifier: Apache-2.0
"""Rooms on the device through which an optimizer's state passes, in float32.

While the update computes in one room, the next one fills and the one before empties.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
"""State of some elements of a weight, by kind: [elements] each."""


@dataclass(frozen=True)
class Kept:
    """The state of some elements of a weight where it is kept."""

    state: State
    """In the types that it is kept in."""
    is_away: bool
    """Whether it is copied to the device and back."""


class Room:
    """Memory on the device for the state of some weights."""

    def __init__(
        self, kinds: Mapping[str, torch.dtype], size: int, device: torch.device, *, copies: bool
    ) -> None:
        """Take the memory.

        Args:
            kinds: Type of each kind of state.
            size: Elements of each.
            device: Where the update computes.
            copies: Whether any state is copied to the device.
        """
        dtypes = {(kind, dtype) for kind, dtype in kinds.items() if copies}
        dtypes |= {(k, torch.float32) for k, dtype in kinds.items() if dtype != torch.float32}
        self._memory = {
            key: torch.empty(size, dtype=key[1], device=device) for key in sorted(dtypes, key=str)
        }
        self.is_filled, self.is_updated, self.is_empty = (torch.cuda.Event() for _ in range(3))
        self.staged: list[State] = []
        """What the room was filled with, in float32."""
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._cast: list[tuple[Tensor, Tensor]] = []

    def fill(self, kept: Sequence[Kept]) -> None:
        """Begin to copy state into the room."""
        self.staged, self._copied, self._cast = [], [], []
        start = 0
        for each in kept:
            staged: State = {}
            for kind, stored in each.state.items():
                near = self._part(kind, stored.dtype, start, stored) if each.is_away else stored
                if near is not stored:
                    self._copied.append((stored, near))
                staged[kind] = near
                if near.dtype != torch.float32:
                    staged[kind] = self._part(kind, torch.float32, start, stored)
                    self._cast.append((near, staged[kind]))
            self.staged.append(staged)
            start += len(stored)
        copy_pairs(self._copied)

    def widen(self) -> None:
        """Make float32 of what was copied."""
        copy_pairs(self._cast)

    def narrow(self) -> None:
        """Round float32 to the types that are kept."""
        copy_pairs(_swapped(self._cast))

    def store(self) -> None:
        """Begin to copy the room's content to where it is kept."""
        copy_pairs(_swapped(self._copied))

    def _part(self, kind: str, dtype: torch.dtype, start: int, like: Tensor) -> Tensor:
        return self._memory[kind, dtype][start : start + len(like)]


def pass_through[Batch: Sequence[Kept]](
    batches: Iterable[Batch], rooms: Sequence[Room], compute: Callable[[Batch, list[State]], None]
) -> None:
    """Bring each batch's state to the device, compute with it, store it; wait for the last one.

    Args:
        batches: Each fits into a room.
        rooms: Made on the current stream, for this pass.
        compute: Changes the state in float32 in place.
    """
    here, incoming, outgoing = (
        torch.cuda.current_stream(),
        torch.cuda.Stream(),
        torch.cuda.Stream(),
    )
    # The rooms' memory was others' before.
    incoming.wait_stream(here)
    for number, batch in enumerate(batches):
        room = rooms[number % len(rooms)]
        with torch.cuda.stream(incoming):
            incoming.wait_event(room.is_empty)
            room.fill(batch)
            room.is_filled.record(incoming)
        here.wait_event(room.is_filled)
        room.widen()
        compute(batch, room.staged)
        room.narrow()
        room.is_updated.record(here)
        with torch.cuda.stream(outgoing):
            outgoing.wait_event(room.is_updated)
            room.store()
            room.is_empty.record(outgoing)
    outgoing.synchronize()


def copy_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the first of each pair into the second, beside what the host does."""
    if pairs:
        sources, targets = map(list, zip(*pairs, strict=True))
        torch._foreach_copy_(targets, sources, non_blocking=True)


def _swapped(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(second, first) for first, second in pairs]
