"""Ranks that were given other rows hear of it instead of waiting for each other."""

import dataclasses

import pytest
import torch

from megatron_keye.training.agreement import check_same_rows
from tests.support.ranks import run_on_ranks
from tests.support.tiny import packed_row


def check(rank_with_other_row: int, is_other_name: bool) -> str:
    """Return what this rank hears."""
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
def test_every_rank_hears_of_other_rows(is_other_name: bool) -> None:
    assert run_on_ranks(2, check, -1, is_other_name) == ["", ""]
    for rank in (0, 1):
        told = run_on_ranks(2, check, rank, is_other_name)
        assert all("skipped on some machines only" in sentence for sentence in told)
