# SPDX-License-Identifier: Apache-2.0
"""Turns what a replica runs next into a rank's tensors: pieces of prompts, or one token an answer.

A row of pieces is also a packed row of training, without labels, for the plan and its pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_keye.data.row import IGNORED_LABEL, PackedRow
from megatron_keye.decoder.batch import Batch
from megatron_keye.decoder.key_cache import LayerCache, RowCache
from megatron_keye.rollout.pieces import Piece
from megatron_keye.rollout.sequence import Answer

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """One row of new tokens on a rank."""

    batch: Batch
    """The tokens; label positions are those behind which a token is drawn."""
    cache: RowCache
    """What they write and see."""


@dataclass(frozen=True, kw_only=True)
class RankCache:
    """A rank's share of the cache, and its place among the tensor ranks."""

    layers: Sequence[LayerCache]
    """One for each layer."""
    page_tokens: int
    """Tokens of a page."""
    tensor_rank: int
    """This rank's place along the tensor axis."""
    num_tensor_ranks: int
    """Size of the tensor axis, of which the length of a row is a multiple."""
    device: torch.device
    """Where they are."""

    @property
    def scratch_slots(self) -> Integers:
        """A slot [1] that no sequence has, for what padding writes."""
        return np.array([(len(self.layers[0].keys_PLGC) - 1) * self.page_tokens])


def packed_pieces(pieces: Sequence[Piece], row_tokens: int) -> PackedRow:
    """Lay pieces end to end as a row of training, padded at its end.

    Args:
        pieces: Pieces that fit into the row together; none for a row of padding.
        row_tokens: Length of the row.
    """
    bounds = _bounds(pieces)
    token_ids = np.zeros(row_tokens, dtype=np.int64)
    token_ids[: bounds[-1]] = np.concatenate([*(p.token_ids for p in pieces), token_ids[:0]])
    numbers = [(piece, start, n) for piece, start in _starts(pieces) for n in piece.pictures]
    return PackedRow(
        token_ids=token_ids,
        labels=np.full(row_tokens, IGNORED_LABEL, dtype=np.int64),
        weights=np.zeros(row_tokens, dtype=np.float32),
        document_bounds=np.unique(np.append(bounds, row_tokens)),
        num_real_tokens=int(bounds[-1]),
        pictures=tuple(piece.group.request.prompt.pictures[n] for piece, _, n in numbers),
        picture_starts=tuple(
            start + piece.group.request.prompt.picture_starts[n] - piece.start
            for piece, start, n in numbers
        ),
        sample_names=tuple(piece.group.request.prompt.name for piece in pieces),
    )


def tokens_of_pieces(
    pieces: Sequence[Piece], row: PackedRow, rank: RankCache, placeholders: Sequence[int]
) -> NewTokens:
    """Return the tensors of a row of pieces.

    Args:
        pieces: The pieces.
        row: From `packed_pieces`.
        rank: This rank's cache.
        placeholders: Tokens that stand for pictures.
    """
    padding = len(row.token_ids) - row.num_real_tokens
    none = np.zeros(padding, dtype=np.int64)
    positions = [piece.group.positions(piece.start, piece.end) for piece in pieces]
    seen = [piece.table.slots(0, piece.end) for piece in pieces]
    firsts = np.cumsum([0, *map(len, seen)])[:-1]
    starts = [np.full(p.end - p.start, f) for p, f in zip(pieces, firsts, strict=True)]
    ends = [f + np.arange(p.start, p.end) + 1 for p, f in zip(pieces, firsts, strict=True)]
    written = [piece.table.slots(piece.start, piece.end) for piece in pieces]
    last = [s + p.end - p.start - 1 for p, s in _starts(pieces) for _ in p.drawn]
    embedded = np.split(row.token_ids, rank.num_tensor_ranks)[rank.tensor_rank]
    batch = _batch(
        rank,
        token_ids=row.token_ids,
        labelled=np.array(last, dtype=np.int64),
        positions=np.concatenate([*positions, np.zeros((3, padding), dtype=np.int64)], axis=1),
        ranges=(np.concatenate([*starts, none]), np.concatenate([*ends, none])),
        features=np.flatnonzero(np.isin(embedded, placeholders)),
    )
    cache = RowCache(
        layers=rank.layers,
        slots_T=_on(rank, np.concatenate([*written, np.repeat(rank.scratch_slots, padding)])),
        # A row of padding alone still has a key, which it does not see.
        key_slots_S=_on(rank, np.concatenate(seen or [rank.scratch_slots])),
    )
    return NewTokens(batch=batch, cache=cache)


def tokens_of_answers(
    answers: Sequence[Answer], rank: RankCache, *, gathers_keys: bool, rounds_up: bool = False
) -> NewTokens:
    """Return the tensors of a row with the newest token of each answer.

    Rows without an answer, and those that fill up to a multiple of the tensor ranks, see nothing:
    every rank needs some token, since its experts are needed by others.

    Args:
        answers: The answers, which have a place for that token.
        rank: This rank's cache.
        gathers_keys: Whether keys are gathered, as dense attention needs; else they are found by
            their pages.
        rounds_up: Whether rows and pages are filled up to powers of two, so that few shapes come.
    """
    rounded = _power_of_two if rounds_up else int
    multiple = rank.num_tensor_ranks
    size = rounded(max(1, -(-len(answers) // multiple))) * multiple
    padding = size - len(answers)
    none = np.zeros(padding, dtype=np.int64)
    tables = [answer.table for answer in answers if answer.table is not None]
    assert len(tables) == len(answers), "answers that run have pages"
    lengths = np.array([*(a.num_cached + 1 for a in answers), *none], dtype=np.int64)
    written = [
        t.slots(a.num_cached, a.num_cached + 1) for t, a in zip(tables, answers, strict=True)
    ]
    positions = [a.group.positions(a.num_cached, a.num_cached + 1) for a in answers]
    starts = np.cumsum(lengths) - lengths
    batch = _batch(
        rank,
        token_ids=np.array([*(a.token_ids[-1] for a in answers), *none], dtype=np.int64),
        labelled=np.arange(size),
        positions=np.concatenate([*positions, np.zeros((3, padding), dtype=np.int64)], axis=1),
        ranges=(starts, starts + lengths),
        features=np.zeros(0, dtype=np.int64),
    )
    slots = np.concatenate([*written, np.repeat(rank.scratch_slots, padding)])
    keys = np.zeros(0, dtype=np.int64)
    if gathers_keys:
        seen = [t.slots(0, a.num_cached + 1) for t, a in zip(tables, answers, strict=True)]
        keys = np.concatenate(seen or [rank.scratch_slots])
    num_pages = rounded(max([1, *(len(table.pages) for table in tables)]))
    pages = np.full((size, num_pages), -1)
    for number, table in enumerate(tables):
        pages[number, : len(table.pages)] = table.pages
    cache = RowCache(
        layers=rank.layers,
        slots_T=_on(rank, slots),
        key_slots_S=_on(rank, keys),
        pages_BN=None if gathers_keys else _on(rank, pages).int(),
        lengths_B=None if gathers_keys else _on(rank, lengths),
    )
    return NewTokens(batch=batch, cache=cache)


def _batch(
    rank: RankCache,
    *,
    token_ids: Integers,
    labelled: Integers,
    positions: Integers,
    ranges: tuple[Integers, Integers],
    features: Integers,
) -> Batch:
    size = len(token_ids)
    return Batch(
        token_ids_BS=_on(rank, token_ids)[None],
        label_positions_L=_on(rank, labelled),
        labels_L=_on(rank, labelled[:0]),
        weights_L=torch.zeros(0, device=rank.device),
        position_ids_3T=_on(rank, positions),
        key_start_T=_on(rank, ranges[0]),
        key_end_T=_on(rank, ranges[1]),
        is_real_T=_on(rank, ranges[1] > ranges[0]),
        gathered_order_S=torch.arange(size, device=rank.device),
        feature_positions_M=_on(rank, features),
    )


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is not below a count of 1 or more."""
    return 1 << (count - 1).bit_length()


def _on(rank: RankCache, array: NDArray[np.generic] | list[int]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(rank.device)


def _bounds(pieces: Sequence[Piece]) -> Integers:
    """Return where pieces begin and end in their row, from 0."""
    return np.cumsum([0, *(piece.end - piece.start for piece in pieces)], dtype=np.int64)


def _starts(pieces: Sequence[Piece]) -> list[tuple[Piece, int]]:
    """Return each piece with its place in the row."""
    return list(zip(pieces, _bounds(pieces)[:-1].tolist(), strict=True))
