# SPDX-License-Identifier: Apache-2.0
"""Normal numbers that depend on a name and on their place in a tensor alone.

Each number is computed from its place, so that any part of a tensor is drawn without the rest, on
any device and in any order. torch's generators count on: a part would need all before it, and a
GPU's numbers are others than a CPU's.

Source: the bits are those of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose state is a
start plus a multiple of the place; the number is the normal distribution's inverse at them.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_keye.kernels.registration import opaque

_DRAWN_AT_ONCE = 1 << 20
"""Numbers drawn at once, in float64: few kernels on a GPU, and little memory."""


def _signed(bits: int) -> int:
    """Return 64 bits as the integer that int64 holds."""
    return bits - (1 << 64) if bits >> 63 else bits


_STRIDE = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _fake_fill_normal(*_: object, **__: object) -> None:
    """Nothing is returned."""


@opaque("fill_normal", _fake_fill_normal, changes=("part",))
@torch.no_grad()
def fill_normal(
    part: Tensor,
    name: str,
    *,
    std: float,
    whole_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> None:
    """Fill a part of a tensor with the numbers that the whole has there.

    Computed in float64, rounded to float32 and then to the part's type. Two devices, whose
    libraries differ in the last bit of float64, so differ in about one number of 10**8, by the
    last bit of float32.

    Args:
        part: Any floating type and strides, with one dimension or more.
        name: Names the tensor and the seed.
        std: Standard deviation; the mean is 0.
        whole_shape: Shape of the whole tensor; that of the part by default.
        offset: Where the part begins in it; at its beginning by default.
    """
    whole, first = whole_shape or part.shape, offset or [0] * part.dim()
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    start = int.from_bytes(digest, "little", signed=True)
    num_rows = max(1, _DRAWN_AT_ONCE // max(1, math.prod(part.shape[1:])))
    for row, rows in zip(range(0, len(part), num_rows), part.split(num_rows), strict=True):
        places = _places(rows, whole, [first[0] + row, *first[1:]])
        rows.copy_(_normal(places, start).mul_(std).float())


def _places(part: Tensor, whole: Sequence[int], first: Sequence[int]) -> Tensor:
    """Return the place of each number in the flattened whole: int64, the part's shape."""
    places = torch.zeros((), dtype=torch.int64, device=part.device)
    for here, size, everywhere in zip(first, part.shape, whole, strict=True):
        steps = torch.arange(here, here + size, device=part.device)
        places = places.unsqueeze(-1) * everywhere + steps
    return places


def _normal(places: Tensor, start: int) -> Tensor:
    """Return a standard normal number for each place, in float64; overwrites the places."""
    bits = places.mul_(_STRIDE).add_(start)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
    bits.bitwise_xor_(_shifted(bits, 31))
    # The 53 highest bits as the middle of one of 2**53 parts of -1 to 1.
    uniform = bits.bitwise_right_shift_(11).double().add_(0.5).mul_(2.0**-52)
    return uniform.erfinv_().mul_(math.sqrt(2))


def _shifted(bits: Tensor, shift: int) -> Tensor:
    """Return the bits shifted to the right, with zeros from the left: int64 has a sign."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
