# SPDX-License-Identifier: Apache-2.0
"""Checks of the operators' arguments.

A tensor that is merely shifted or transposed would give wrong numbers without any complaint, so
every public operator states its contract through these few functions.
"""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Floating-point types that every eager operator takes."""
INDEX_DTYPES = (torch.int32, torch.int64)
"""Types of lists of selected keys."""


def check_shapes(**tensors: Tensor) -> dict[str, int]:
    """Return the size behind each shape letter, after checking that all tensors agree on it.

    Args:
        tensors: Tensors under the names of the public function; the capitals after the last
            underscore of a name are its dimensions in memory order (q_TIJ has T, I and J).

    Raises:
        ValueError: When a tensor has another number of dimensions than letters, two tensors
            disagree on a letter, or a tensor lies on another device than the first.
    """
    sizes: dict[str, int] = {}
    owners: dict[str, str] = {}
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        letters = name.rsplit("_", 1)[-1]
        shape = tuple(tensor.shape)
        if len(shape) != len(letters):
            raise ValueError(
                f"{name}: got shape {shape}, expected {len(letters)} dimensions "
                f"[{', '.join(letters)}]; reshape it before the call"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected {first.device} as {first_name}; "
                "move it there before the call"
            )
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name}: got {letter} = {size} in shape {shape}, expected {letter} = "
                    f"{sizes[letter]} as in {owners[letter]}; pass tensors of one row"
                )
            owners.setdefault(letter, name)
    return sizes


def check_dtypes(allowed: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    """Raise unless every tensor has one of the `allowed` types.

    Raises:
        ValueError: Names the first tensor of another type.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(
                f"{name}: got {tensor.dtype}, expected {expected}; convert it before the call"
            )


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise unless all tensors have one floating-point type.

    Raises:
        ValueError: Names the first tensor whose type is not floating point or not the first's.
    """
    check_dtypes(FLOAT_DTYPES, **tensors)
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{name}: got {tensor.dtype}, expected {first.dtype} as {first_name}; "
                "convert one of the two before the call"
            )


def check_groups(num_heads: int, num_groups: int) -> None:
    """Raise unless the query heads H divide evenly among the key-value heads G.

    Raises:
        ValueError: When H is not a multiple of G.
    """
    if num_groups == 0 or num_heads % num_groups != 0:
        raise ValueError(
            f"query heads: got H = {num_heads}, expected a multiple of the key-value heads "
            f"G = {num_groups}; check num_heads and num_kv_heads"
        )


def check_key_ranges(rows: Tensor, key_start_T: Tensor, key_end_T: Tensor) -> None:
    """Raise unless both ends of the visible range are int64 [T] beside `rows` [T, ...].

    Raises:
        ValueError: On another length, type or device.
    """
    for name, bound_T in (("key_start_T", key_start_T), ("key_end_T", key_end_T)):
        check_dtypes((torch.int64,), **{name: bound_T})
        if bound_T.shape != rows.shape[:1] or bound_T.device != rows.device:
            raise ValueError(
                f"{name}: got shape {tuple(bound_T.shape)} on {bound_T.device}, expected "
                f"[T] = ({rows.shape[0]},) on {rows.device}; pass one bound for each query"
            )


def check_key_reach(keys: Tensor, key_reach_S: Tensor | None) -> None:
    """Raise unless the reach of keys, where there is one, is int64 [S] beside `keys` [S, ...].

    Raises:
        ValueError: On another length, type or device.
    """
    if key_reach_S is None:
        return
    check_dtypes((torch.int64,), key_reach_S=key_reach_S)
    if key_reach_S.shape != keys.shape[:1] or key_reach_S.device != keys.device:
        raise ValueError(
            f"key_reach_S: got shape {tuple(key_reach_S.shape)} on {key_reach_S.device}, expected "
            f"[S] = ({keys.shape[0]},) on {keys.device}; pass one number for each key"
        )
