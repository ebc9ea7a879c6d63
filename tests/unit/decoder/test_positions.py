# SPDX-License-Identifier: Apache-2.0
"""The position rule and the rotary tables, against cases worked out by hand."""

import numpy as np
import torch

from megatron_keye.decoder.positions import position_ids, rotary_table
from megatron_keye.kernels.rotary import rotate


def test_text_alone_counts_up_in_all_three() -> None:
    got = position_ids(np.array([0, 5]), [], [])
    assert (got == np.arange(5)).all()


def test_text_continues_after_the_longer_side_of_a_picture() -> None:
    # Two text tokens, a picture of 2 x 3 tokens, two text tokens.
    got = position_ids(np.array([0, 10]), [2], [(2, 3)])
    assert got[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert got[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert got[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]


def test_frames_of_a_video_follow_each_other_with_text_between() -> None:
    # text, frame 1 x 2, text, frame 1 x 2
    got = position_ids(np.array([0, 6]), [1, 4], [(1, 2), (1, 2)])
    assert got[0].tolist() == [0, 1, 1, 3, 4, 4]
    assert got[2].tolist() == [0, 1, 2, 3, 4, 5]


def test_each_document_starts_at_zero_again() -> None:
    got = position_ids(np.array([0, 3, 9]), [0, 4], [(1, 2), (2, 2)])
    assert got[0].tolist() == [0, 0, 2, 0, 1, 1, 1, 1, 3]
    assert got[1].tolist() == [0, 0, 2, 0, 1, 1, 2, 2, 3]


def test_each_branch_goes_on_from_the_end_of_its_parent() -> None:
    # One text token, a picture of 2 x 2 and two text tokens; behind them two branches, the second
    # of which has a picture of its own and a branch behind it; then another document.
    bounds, parents = np.array([0, 7, 9, 12, 14, 16]), [-1, 0, 0, 2, -1]
    got = position_ids(bounds, [1, 10], [(2, 2), (1, 2)], parents)
    assert got[0].tolist() == [0, 1, 1, 1, 1, 3, 4, 5, 6, 5, 6, 6, 8, 9, 0, 1]
    assert got[2].tolist() == [0, 1, 2, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 0, 1]


def test_sections_take_their_frequencies_from_their_own_position() -> None:
    ids = torch.tensor([[1], [10], [100]])
    cos, sin = rotary_table(ids, 8, (1, 2, 1), theta=10_000.0)
    frequencies = [1.0, 0.1, 0.01, 0.001]
    angles = torch.tensor([1.0 * 1, 10 * 0.1, 10 * 0.01, 100 * 0.001])
    assert len(frequencies) == len(angles)
    torch.testing.assert_close(cos[0], torch.cat([angles, angles]).cos())
    torch.testing.assert_close(sin[0], torch.cat([angles, angles]).sin())


def test_rotation_depends_only_on_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, generator=generator, dtype=torch.float64)
    products = []
    for first, second in ((3, 1), (13, 11)):
        cos_q, sin_q = rotary_table(torch.full((3, 1), first), 8, (1, 2, 1), 100.0)
        cos_k, sin_k = rotary_table(torch.full((3, 1), second), 8, (1, 2, 1), 100.0)
        products.append((rotate(q, cos_q, sin_q) * rotate(k, cos_k, sin_k)).sum())
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-6)


def test_rotation_keeps_lengths_and_type() -> None:
    x = torch.randn(5, 2, 8, dtype=torch.bfloat16)
    cos, sin = rotary_table(torch.arange(5).expand(3, 5), 8, (1, 2, 1), 100.0)
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(
        turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=1e-2
    )
