# SPDX-License-Identifier: Apache-2.0
"""Binding of the CUDA sparse decode: scores, exact top-k and attention in three launches.

The contract stands in api.py, the device code in csrc/sparse_decode/ and csrc/select_top_k/. All
that such a step can be measured by is the memory that it reads once. At batch 32 with 131,072 keys
of 16 bits, 4 groups of 128 channels and k = 2048 that is

    indexer keys   537 MB   (285 MB as e4m3 with scales)
    selected keys  134 MB   with their values
    scores          17 MB   written and read, mostly within the L2 cache

or 207 us of an H100's 3.35 TB/s for 16 bits and 130 us for 8, where the Triton form took 336 and
255 us. On an H200, whose memory copies at 4.26 TB/s, the parts took, each from a cold cache:

                          Triton    here    bytes alone
    scores of 16 bits     161 us    161 us       126 us
    scores of 8 bits      155       125           67
    selection                    41                4
    attention              60        52           31

Keys of 8 bits cost instructions rather than bytes, and the selection waits for counts.

Shape letters: B sequences, T new queries of each, I indexer heads, J indexer channels, H query
heads, G key-value heads, C channels of a head, K selected keys, P pages of the cache, L places of
a page, N pages of a sequence, S keys (N * L).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_keye.kernels.extension import (
    check_built,
    check_taken,
    first_unsupported,
    hopper_reason,
    register,
)
from megatron_keye.kernels.select_top_k import cuda as selection
from megatron_keye.kernels.sparse_decode.reference import PagedCache

CHANNELS = (64, 128)
MAX_GROUP_HEADS = 16
INDEX_CHANNELS = 64
MAX_INDEX_HEADS = 16
MAX_QUERIES = 8
SMALLEST_PAGE = 16
_MAX_KEYS = 2**30
_VECTOR_BYTES = 16
_WARPS, _MAX_CLUSTER = 8, 8
"""Warps of a thread block that attends, and blocks that share a selection at most."""
_LIST_KEYS = 32
"""Selected keys that a warp looks up at once."""
_TILE_KEYS, _MAX_TILES = 128, 16
"""Keys that a thread block scores at once, and how often at most."""
_SCORING_BLOCKS = 4
"""Thread blocks of a multiprocessor that score at once."""
_SCORES, _ATTENTION = "sparse_decode_scores", "sparse_decode_attention"


class Cut(NamedTuple):
    """How the attention to a selection is cut; its result depends on it by rounding alone."""

    groups_of_block: int
    """Groups that a thread block attends for, with a warp each or several."""
    cluster: int
    """Thread blocks that share the selection of these groups."""


CUT: Cut | None = None
"""None for what `choose_cut` says; only tests and benchmarks set another."""


def _fake_scores(
    q_BTIJ: Tensor,
    gate_BTI: Tensor,
    index_keys_PLJ: Tensor,
    index_scales_PL: Tensor | None,
    pages_BN: Tensor,
    lengths_B: Tensor,
    tiles_of_block: int,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the results, for tracing."""
    num_rows = q_BTIJ.shape[0] * q_BTIJ.shape[1]
    num_keys = pages_BN.shape[1] * index_keys_PLJ.shape[1]
    scores_TS = q_BTIJ.new_empty((num_rows, num_keys), dtype=torch.float32)
    return scores_TS, lengths_B.new_empty((num_rows,))


def _fake_attention(query_BTHC: Tensor, *_: object) -> Tensor:
    """Shape and dtype of the result, for tracing."""
    return torch.empty_like(query_BTHC, memory_format=torch.contiguous_format)


register(_SCORES, _fake_scores)
register(_ATTENTION, _fake_attention)


def unsupported_reason(q_BTIJ: Tensor, query_BTHC: Tensor, cache: PagedCache) -> str | None:
    """Return what the kernels do not take of such a call, as "got ..., expected ...", or None.

    Args:
        q_BTIJ: Indexer queries.
        query_BTHC: Attention queries.
        cache: Keys and values of their types, on their device.
    """
    _, num_queries, index_heads, index_channels = q_BTIJ.shape
    heads = query_BTHC.shape[2] // max(1, cache.keys_PLGC.shape[2])
    channels, places = query_BTHC.shape[3], cache.keys_PLGC.shape[1]
    num_keys, key_dtype = cache.pages_BN.shape[1] * places, cache.keys_PLGC.dtype
    is_page = places >= SMALLEST_PAGE and places.bit_count() == 1
    got_and_expected = [
        (not q_BTIJ.is_cuda, f"a tensor on {q_BTIJ.device}", "a GPU"),
        (q_BTIJ.dtype != torch.bfloat16, str(q_BTIJ.dtype), "torch.bfloat16"),
        (query_BTHC.dtype != torch.bfloat16, str(query_BTHC.dtype), "torch.bfloat16"),
        (key_dtype != torch.bfloat16, f"keys and values of {key_dtype}", "torch.bfloat16"),
        (index_channels != INDEX_CHANNELS, f"J = {index_channels}", f"{INDEX_CHANNELS}"),
        (index_heads > MAX_INDEX_HEADS, f"I = {index_heads}", f"1 to {MAX_INDEX_HEADS}"),
        (num_queries > MAX_QUERIES, f"T = {num_queries}", f"1 to {MAX_QUERIES}"),
        (channels not in CHANNELS, f"C = {channels}", "64 or 128"),
        (heads > MAX_GROUP_HEADS, f"H / G = {heads}", f"1 to {MAX_GROUP_HEADS}"),
        (not is_page, f"L = {places}", f"a power of two from {SMALLEST_PAGE} on"),
        (num_keys > _MAX_KEYS, f"N * L = {num_keys}", f"at most {_MAX_KEYS}"),
    ]
    return first_unsupported(got_and_expected) or hopper_reason(_SCORES, q_BTIJ.device)


def sparse_decode(
    q_BTIJ: Tensor,
    gate_BTI: Tensor,
    query_BTHC: Tensor,
    cache: PagedCache,
    k: int,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out_BTHC and indices_BTK; see api.sparse_decode.

    Raises:
        RuntimeError: The extension is not built.
        ValueError: The kernels do not take such tensors.
    """
    check_built(_SCORES)
    check_taken("sparse_decode", unsupported_reason(q_BTIJ, query_BTHC, cache))
    shape = (*q_BTIJ.shape[:2], k)
    if 0 in (len(q_BTIJ), q_BTIJ.shape[1], cache.pages_BN.numel(), len(cache.keys_PLGC)):
        return torch.zeros_like(query_BTHC), cache.pages_BN.new_full(shape, -1)
    cache = _readable(cache)
    scores_TS, end_T = score_pages(q_BTIJ, gate_BTI, cache)
    indices_TK = select(scores_TS, end_T, k)
    out_BTHC = attend(query_BTHC, cache, indices_TK, scale=scale)
    return out_BTHC, indices_TK.view(shape)


def score_pages(q_BTIJ: Tensor, gate_BTI: Tensor, cache: PagedCache) -> tuple[Tensor, Tensor]:
    """Return scores [B * T, S], unspecified past a query's end, and those ends [B * T], int64.

    Args:
        q_BTIJ: Indexer queries, bfloat16.
        gate_BTI: Weight of each indexer head.
        cache: As `sparse_decode` takes it, rows at multiples of 16 bytes.
    """
    if gate_BTI.dtype not in (torch.float32, torch.bfloat16):
        gate_BTI = gate_BTI.float()
    num_keys = cache.pages_BN.shape[1] * cache.index_keys_PLJ.shape[1]
    num_blocks = _SCORING_BLOCKS * _num_multiprocessors(q_BTIJ.device)
    scores_TS, end_T = torch.ops.megatron_keye.sparse_decode_scores(
        q_BTIJ.contiguous(),
        gate_BTI.contiguous(),
        cache.index_keys_PLJ,
        cache.index_scales_PL,
        cache.pages_BN,
        cache.lengths_B,
        choose_tiles(len(q_BTIJ), num_keys, num_blocks),
    )
    return scores_TS, end_T


def select(scores_TS: Tensor, end_T: Tensor, k: int) -> Tensor:
    """Return indices_TK, int32: the k best keys below each row's end, ascending, then -1."""
    if selection.splits_rows(scores_TS):
        return selection.select_top_k_split_rows(scores_TS, end_T, k)
    return selection.select_top_k(scores_TS, torch.zeros_like(end_T), end_T, k)


def attend(query_BTHC: Tensor, cache: PagedCache, indices_TK: Tensor, *, scale: float) -> Tensor:
    """Return out_BTHC, the attention of each query over its row of selected keys.

    Args:
        query_BTHC: Queries, bfloat16.
        cache: As `sparse_decode` takes it, rows at multiples of 16 bytes.
        indices_TK: int32 [B * T, K], -1 only behind a row's last key.
        scale: Factor of the logits.
    """
    num_groups = cache.keys_PLGC.shape[2]
    num_blocks = _num_multiprocessors(query_BTHC.device)
    num_rows, num_selected = indices_TK.shape
    cut = CUT or choose_cut(num_rows, num_selected, num_groups, num_blocks)
    out_BTHC: Tensor = torch.ops.megatron_keye.sparse_decode_attention(
        query_BTHC.contiguous(),
        cache.keys_PLGC,
        cache.values_PLGC,
        cache.pages_BN,
        indices_TK,
        scale,
        *cut,
    )
    return out_BTHC


def choose_tiles(num_sequences: int, num_keys: int, num_blocks: int) -> int:
    """Return how many tiles of keys a thread block scores, one after the other.

    Args:
        num_sequences: B.
        num_keys: S.
        num_blocks: Thread blocks that run at once. Four times as many leave little idle at the
            end; more would begin, without keys on their way, more often.
    """
    tiles = num_sequences * -(-num_keys // _TILE_KEYS)
    waves = 4 if tiles > 8 * num_blocks else 1
    return min(_MAX_TILES, max(1, -(-tiles // (waves * num_blocks))))


def choose_cut(num_rows: int, num_selected: int, num_groups: int, num_blocks: int) -> Cut:
    """Return a cut that fills the GPU once, and has two groups of a key read together if it can.

    Groups of a key lie side by side in the cache. Blocks of a cluster need neighbouring
    multiprocessors, so clusters of four or more are given half of the GPU: on an H200, 32 of four
    took 69 us where 64 of two took 52.

    Args:
        num_rows: B * T.
        num_selected: K.
        num_groups: G.
        num_blocks: Thread blocks that run at once.
    """
    num_lists = -(-num_selected // _LIST_KEYS)
    cuts = []
    for groups in (1, 2):
        if num_groups % groups == 0:
            num_clusters, cluster = num_rows * (num_groups // groups), 1
            while (
                cluster < _MAX_CLUSTER
                and 2 * cluster * num_clusters <= num_blocks // (1 if cluster == 1 else 2)
                and cluster * _WARPS // groups < num_lists
            ):
                cluster *= 2
            cuts.append((cluster * num_clusters, Cut(groups, cluster)))
    most = min(num_blocks // 4 * 3, max(blocks for blocks, _ in cuts))
    return max(cut for blocks, cut in cuts if blocks >= most)


def _readable(cache: PagedCache) -> PagedCache:
    """Return the cache as the kernels read it, copied only where it does not lie so."""
    keys_PLGC, values_PLGC, index_keys_PLJ = map(_at_vectors, cache[:3])
    if keys_PLGC.stride() != values_PLGC.stride():
        keys_PLGC, values_PLGC = keys_PLGC.contiguous(), values_PLGC.contiguous()
    scales_PL = cache.index_scales_PL
    return PagedCache(
        keys_PLGC,
        values_PLGC,
        index_keys_PLJ,
        _adjacent(cache.pages_BN),
        cache.lengths_B.contiguous(),
        scales_PL if scales_PL is None else _adjacent(scales_PL),
    )


def _adjacent(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _at_vectors(tensor: Tensor) -> Tensor:
    """Return the tensor with rows of adjacent channels that begin at multiples of 16 bytes."""
    steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    is_aligned = all(step % _VECTOR_BYTES == 0 for step in (tensor.data_ptr(), *steps))
    return (
        tensor
        if is_aligned and tensor.stride(-1) == 1
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
