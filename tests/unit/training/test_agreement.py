# SPDX-License-Identifier: Apache-2.0
"""Ranks with different rows raise instead of waiting for each other."""

import dataclasses

import pytest
import torch

from megatron_keye.data.row import IGNORED_LABEL
from megatron_keye.training.agreement import (
    Damaged,
    agree_on_damaged,
    check_same_rows,
    damaged_samples,
    without_labels,
)
from tests.support.ranks import run_on_ranks
from tests.support.tiny import packed_row


def check(rank_with_other_row: int, is_other_name: bool) -> str:
    """Return the error on this rank."""
    row = packed_row(0, (9, ((4, 4),)), (5, ()))
    if torch.distributed.get_rank() == rank_with_other_row:
        names = tuple(f"other {name}" for name in row.sample_names)
        other = dataclasses.replace(row, sample_names=names)
        row = other if is_other_name else packed_row(0, (9, ((4, 4),)), (6, ()))
    try:
        check_same_rows([row, row], torch.device("cpu"))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("is_other_name", [False, True])
def test_every_rank_raises_on_different_rows(is_other_name: bool) -> None:
    assert run_on_ranks(2, check, -1, is_other_name) == ["", ""]
    for rank in (0, 1):
        errors = run_on_ranks(2, check, rank, is_other_name)
        assert all("skipped on some machines only" in error for error in errors)


def check_without_rows(rank_without: int) -> str:
    rows = None if torch.distributed.get_rank() == rank_without else [packed_row(0, (9, ()))]
    try:
        check_same_rows(rows, torch.device("cpu"))
    except RuntimeError as error:
        return str(error)
    return ""


def test_every_rank_raises_if_one_has_no_rows() -> None:
    assert all("on some machines only" in text for text in run_on_ranks(2, check_without_rows, 1))


def agree(of_ranks: list[Damaged]) -> list[tuple[tuple[int, int], str]]:
    mine = of_ranks[torch.distributed.get_rank()]
    return list(agree_on_damaged(mine, torch.device("cpu")).items())


@pytest.mark.parametrize(
    ("of_ranks", "agreed"),
    [
        ([{}, {}], []),
        ([{}, {(1, 0): "b"}], [((1, 0), "b")]),
        ([{(1, 0): "mine", (0, 2): "a"}, {(1, 0): "other"}], [((0, 2), "a"), ((1, 0), "mine")]),
    ],
)
def test_ranks_agree_on_what_is_damaged(of_ranks: list[Damaged], agreed: list[object]) -> None:
    assert run_on_ranks(2, agree, of_ranks) == [agreed, agreed]


def test_damage_masks_the_labels_of_its_document_alone() -> None:
    rows = [
        packed_row(0, (9, ()), (8, ((4, 4),)), (7, ((2, 2),))),
        packed_row(1, (5, ((2, 2), (2, 2))), (6, ())),
    ]
    damaged = damaged_samples(rows, {"0-1": "is cut", "1-0": "is gone", "elsewhere": "is far"})
    assert damaged == {(0, 1): "sample 0-1: is cut", (1, 0): "sample 1-0: is gone"}
    masked = without_labels(rows, damaged)
    for index, (before, after) in enumerate(zip(rows, masked, strict=True)):
        assert dataclasses.replace(after, labels=before.labels) == before
        for document in range(len(before.sample_names)):
            tokens = slice(*before.document_bounds[document : document + 2].tolist())
            is_kept = (index, document) not in damaged
            expected = before.labels[tokens] if is_kept else IGNORED_LABEL
            assert (after.labels[tokens] == expected).all()
    assert without_labels(rows, {}) == rows
