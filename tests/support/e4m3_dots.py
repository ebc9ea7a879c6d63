# SPDX-License-Identifier: Apache-2.0
"""What Hopper's tensor cores make of products of e4m3 numbers, and how far that may be off.

Source: P. Xie et al., "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores",
arXiv 2511.10909, for what the instruction cuts off.

Shape letter: J channels, 64 of them; further dimensions before it are those of one vector each.
"""

import torch
from torch import Tensor

_BITS = 13
"""Behind the first one: of what is added, in units of the largest, and of the sum."""
_TERMS = 32
"""Products that one instruction adds up, and what it adds them to."""
_LOWEST_EXPONENT = -6
"""Of an e4m3 number; smaller ones have fewer bits."""


def hopper_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the sums over J of products of e4m3 numbers, as float64, that Hopper computes."""
    sums = torch.zeros(torch.broadcast_shapes(a.shape, b.shape)[:-1], dtype=torch.float64)
    parts = a.double().split(_TERMS, -1), b.double().split(_TERMS, -1)
    for part_a, part_b in zip(*parts, strict=True):
        sums = _add_products(part_a, part_b, sums.to(a.device))
    return sums


def bound_error(a: Tensor, b: Tensor) -> Tensor:
    """Return how much `hopper_dots` may differ from the exact sums at most.

    In each of two instructions, 33 terms and the sum lose less than 2^-13 of the largest power of
    two among the terms, or of the sum.
    """
    a, b = a.double(), b.double()
    smallest = 2.0**_LOWEST_EXPONENT
    largest = (a.abs().clamp(min=smallest) * b.abs().clamp(min=smallest)).amax(-1)
    for num_terms in (_TERMS, 2 * _TERMS):
        sums = (a[..., :num_terms] * b[..., :num_terms]).sum(-1)
        largest = torch.maximum(largest, sums.abs())
    # A half more, since the first sum that counts is the computed one.
    return 2 * (_TERMS + 2.5) * 2.0**-_BITS * largest


def _add_products(a: Tensor, b: Tensor, sums: Tensor) -> Tensor:
    """Return sums + a . b for numbers of up to 32 terms, as one instruction does."""
    products = a * b
    exponent = _exponent(a, _LOWEST_EXPONENT) + _exponent(b, _LOWEST_EXPONENT)
    exponent = exponent.masked_fill(products == 0, -126).amax(-1)
    exponent = torch.maximum(exponent, _exponent(sums, -126))
    unit = 2.0 ** (exponent - _BITS).double()
    total = (torch.trunc(products / unit[..., None]).sum(-1) + torch.trunc(sums / unit)) * unit
    unit = 2.0 ** (_exponent(total, -126) - _BITS).double()
    return torch.trunc(total / unit) * unit


def _exponent(numbers: Tensor, lowest: int) -> Tensor:
    return (torch.frexp(numbers)[1] - 1).clamp(min=lowest).masked_fill(numbers == 0, lowest)
