# SPDX-License-Identifier: Apache-2.0
"""What a recomputed layer's first pass hands to its second one, in the backward pass.

The second pass never selects again: scoring all keys of a long row costs more than everything
that the selection's size saves.

Shape letters: T queries, K selected keys, B blocks of 2^16 keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_keye.kernels.host_tensor import HostTensor
from megatron_keye.kernels.kept_outputs import KeptOutputs

_BLOCK_KEYS = 2**16


@dataclass(frozen=True)
class PackedSelection:
    """A selection in half the bytes: the low 16 bits of each key, and where blocks end.

    It is another tensor than the selection, with which its union lists are remembered; they would
    take up to three times these bytes, and are merged again in a hundredth of the layer's time.
    """

    low_TK: HostTensor | Tensor
    """int16 [T, K]: low bits of the selected keys."""
    ends_TB: Tensor
    """int32 [T, B]: for each block of 2^16 keys the place after its last selected key."""

    @staticmethod
    def of(
        indices_TK: Tensor, num_keys: int, *, in_host_memory: bool = False
    ) -> "PackedSelection":
        """Pack a selection.

        Args:
            indices_TK: int32 as `select_top_k` gives them: ascending keys, then -1.
            num_keys: Keys of the row.
            in_host_memory: Whether it waits there.
        """
        is_real_TK = indices_TK >= 0
        ends = [
            ((indices_TK < end) & is_real_TK).sum(dim=1, dtype=torch.int32)
            for end in range(_BLOCK_KEYS, num_keys + _BLOCK_KEYS, _BLOCK_KEYS)
        ]
        # The first half of each number, as bytes lie on every machine that runs this.
        low_TK = indices_TK.contiguous().view(torch.int16)[:, ::2].contiguous()
        kept = HostTensor(low_TK) if in_host_memory else low_TK
        return PackedSelection(kept, torch.stack(ends, dim=1))

    def unpack(self) -> Tensor:
        """Return the selection, int32 [T, K]."""
        kept = self.low_TK
        low_TK = kept.on_device() if isinstance(kept, HostTensor) else kept
        indices_TK = low_TK.to(torch.int32) & (_BLOCK_KEYS - 1)
        place_K = torch.arange(low_TK.shape[1], device=low_TK.device)
        *ends, last = self.ends_TB.unbind(dim=1)
        for end_T in ends:
            indices_TK.add_(place_K >= end_T[:, None], alpha=_BLOCK_KEYS)
        return indices_TK.masked_fill_(place_K >= last[:, None], -1)


@dataclass
class KeptAttention:
    """What one layer's attention keeps of one row, from its first pass to its second one."""

    outputs: KeptOutputs | None
    """Of dense or sparse attention; None where they are computed again."""
    selection: PackedSelection | None = None
    """The indexer's selection; None before it is made, and where attention is dense."""

    def of_second_pass(self) -> "KeptAttention":
        """Return this, which from now on gives out what the first pass kept."""
        if self.outputs is not None:
            self.outputs.begin_second_call()
        return self
