# SPDX-License-Identifier: Apache-2.0
"""Keys and values of one layer in pages, and which of them a row writes and sees.

Shape letters: P pages, L places of a page, G key-value heads, C channels of a head, J indexer
channels, T tokens of the row, S keys, B sequences, N pages of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_keye.kernels.head_quantization import dequantize_heads, quantize_heads
from megatron_keye.kernels.indexer_quantization import dequantize, split_rounded


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The pages of one layer on this rank; slot s is place s % L of page s // L."""

    keys_PLGC: Tensor
    """Rotated keys of this tensor rank's groups, in the type of the model or as e4m3."""
    values_PLGC: Tensor
    """Their values; keys and values of a token lie side by side."""
    key_scales_PLG: Tensor | None = None
    """float32: one scale for each key where keys and values are e4m3; else None."""
    value_scales_PLG: Tensor | None = None
    """Those of the values."""
    index_keys_PLJ: Tensor
    """Indexer keys, in the type of the model or as e4m3."""
    index_scales_PL: Tensor | None
    """float32: one scale for each indexer key where those are e4m3; else None."""

    def write_heads(self, slots_T: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Write keys and values at slots, int64 [T]; they are rounded where e4m3 is kept."""
        page, place = self._split(slots_T)
        if self.key_scales_PLG is None or self.value_scales_PLG is None:
            self.keys_PLGC[page, place] = k_TGC
            self.values_PLGC[page, place] = v_TGC
            return
        for heads_TGC, values_PLGC, scales_PLG in (
            (k_TGC, self.keys_PLGC, self.key_scales_PLG),
            (v_TGC, self.values_PLGC, self.value_scales_PLG),
        ):
            values_TGC, scales_TG = quantize_heads(heads_TGC)
            # As bytes, since not every type can be moved by index.
            values_PLGC.view(torch.uint8)[page, place] = values_TGC.view(torch.uint8)
            scales_PLG[page, place] = scales_TG

    def write_index_keys(self, slots_T: Tensor, k_TJ: Tensor) -> None:
        """Write indexer keys at slots; if they are kept as e4m3, those of `round_to_fp8`."""
        page, place = self._split(slots_T)
        if self.index_scales_PL is None:
            self.index_keys_PLJ[page, place] = k_TJ
            return
        values_TJ, scales_T = split_rounded(k_TJ)
        # As bytes, since not every type can be moved by index.
        self.index_keys_PLJ.view(torch.uint8)[page, place] = values_TJ.view(torch.uint8)
        self.index_scales_PL[page, place] = scales_T

    def read_heads(self, slots_S: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values [S, G, C] at slots, int64 [S], in the type of the model."""
        if self.key_scales_PLG is None:
            page, place = self._split(slots_S)
            return self.keys_PLGC[page, place], self.values_PLGC[page, place]
        k_SGC, k_scales_SG, v_SGC, v_scales_SG = self.read_fp8_heads(slots_S)
        return (
            dequantize_heads(k_SGC, k_scales_SG, dtype),
            dequantize_heads(v_SGC, v_scales_SG, dtype),
        )

    def read_fp8_heads(self, slots_S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return e4m3 keys [S, G, C] at slots, their scales [S, G], values and theirs."""
        assert self.key_scales_PLG is not None, "keys of 8 bits have scales"
        assert self.value_scales_PLG is not None, "as their values have"
        page, place = self._split(slots_S)
        k_SGC, v_SGC = (
            heads_PLGC.view(torch.uint8)[page, place].view(torch.float8_e4m3fn)
            for heads_PLGC in (self.keys_PLGC, self.values_PLGC)
        )
        return k_SGC, self.key_scales_PLG[page, place], v_SGC, self.value_scales_PLG[page, place]

    def read_index_keys(self, slots_S: Tensor, dtype: torch.dtype) -> Tensor:
        """Return indexer keys [S, J] at slots, in the type of the model."""
        page, place = self._split(slots_S)
        if self.index_scales_PL is None:
            return self.index_keys_PLJ[page, place]
        values_SJ = self.index_keys_PLJ.view(torch.uint8)[page, place].view(torch.float8_e4m3fn)
        return dequantize(values_SJ, self.index_scales_PL[page, place], dtype)

    def _split(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        page_size = self.keys_PLGC.shape[1]
        return slots // page_size, slots % page_size


@dataclass(frozen=True, kw_only=True)
class RowCache:
    """The cache as one row of tokens uses it."""

    layers: Sequence[LayerCache]
    """One for each layer of the decoder."""
    slots_T: Tensor
    """int64: where the keys of the row's tokens are written; those of padding where nobody
    reads."""
    key_slots_S: Tensor
    """int64: slots of the keys that the row's queries see, to which `DecoderRow.key_start_T` and
    `key_end_T` refer; empty where `pages_BN` says the same."""
    pages_BN: Tensor | None = None
    """int32: pages of sequences of which each token of the row is the newest, -1 for none; None
    where it is several tokens of a sequence."""
    lengths_B: Tensor | None = None
    """int64, beside `pages_BN`: keys of each sequence, the new one included; 0 for padding."""
