"""Lightning indexer on a GPU: scores of some rows in Triton, then their exact top-k.

No more than a byte budget of the score matrix exists at any moment. A row's selection does not
depend on the chunk that it falls into, so recomputation repeats it bit by bit.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.indexer_scores.triton import indexer_scores

CHUNK_BYTES = 2**29
"""Bytes of float32 scores in each of two buffers; tests shrink it."""
_ROW_MULTIPLE = 128
"""Rows of a block of the score kernel, so that chunks waste none."""


@torch.no_grad()
def lightning_indexer(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
) -> Tensor:
    """Return indices_TK; see api.lightning_indexer. NaN scores rank below -inf."""
    num_queries, num_keys = q_TIJ.shape[0], k_SJ.shape[0]
    num_rows = max(1, CHUNK_BYTES // max(1, 4 * num_keys))
    num_rows = min(max(1, num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE, num_queries)
    buffers = [q_TIJ.new_empty((num_rows, num_keys), dtype=torch.float32) for _ in range(2)]
    indices_TK = q_TIJ.new_empty((num_queries, k), dtype=torch.int32)
    select, streams = _selection(q_TIJ), _TwoStreams(q_TIJ.device)
    for number, first in enumerate(range(0, num_queries, max(1, num_rows))):
        rows = slice(first, first + num_rows)
        ranges = key_start_T[rows], key_end_T[rows]
        chunk_TS = buffers[number % 2][: len(ranges[0])]
        streams.wait_until_selected(number - 2)
        indexer_scores(
            q_TIJ[rows], k_SJ, gate_TI[rows], *ranges, out_TS=chunk_TS, fill_outside=False
        )
        with streams.selecting():
            indices_TK[rows] = select(chunk_TS, *ranges, k)
    streams.join()
    return indices_TK


class _TwoStreams:
    """Scores on the current stream, selections beside them on a second one; on a CPU, in turn.

    Scores are bound by arithmetic and selections by memory, so they share a GPU well.
    """

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._side = _side_stream(device) if device.type == "cuda" else None
        self._selected: list[torch.cuda.Event] = []

    def wait_until_selected(self, chunk: int) -> None:
        """Let the current stream wait until a chunk's buffer is free again."""
        if self._main is not None and chunk >= 0:
            self._main.wait_event(self._selected[chunk])

    @contextmanager
    def selecting(self) -> Iterator[None]:
        """Run what is inside beside later work of the current stream."""
        if self._main is None or self._side is None:
            yield
            return
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield
            self._selected.append(self._side.record_event())

    def join(self) -> None:
        """Let the current stream, which owns all memory, wait for the second one."""
        if self._main is not None and self._side is not None:
            self._main.wait_stream(self._side)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of selections; its blocks go first, since they free a buffer."""
    return torch.cuda.Stream(device, priority=-1)


def _selection(on: Tensor) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Return the extension's selection where it is built, else Triton's; they agree bit by bit."""
    cuda = import_module("megatron_keye.kernels.select_top_k.cuda")
    name = "cuda" if on.is_cuda and cuda.is_built() else "triton"
    implementation = import_module(f"megatron_keye.kernels.select_top_k.{name}")
    select: Callable[[Tensor, Tensor, Tensor, int], Tensor] = implementation.select_top_k
    return select
