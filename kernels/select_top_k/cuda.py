# SPDX-License-Identifier: Apache-2.0
"""Binding of the CUDA top-k selection, the one file of the operator that needs the extension.

Imported only when that implementation is asked for, so that everything else works without a
compiler. The contract stands in api.py, the device code in csrc/select_top_k/.
"""

import torch
from torch import Tensor

from megatron_keye.kernels.extension import check_built, missing_reason, register

MAX_KEYS_OF_SPLIT_ROW = 262_144
"""Keys of a row that `select_top_k_split_rows` takes: what the registers of a cluster hold."""
_SPLIT_ROWS_PAY_UP_TO = 64
"""Rows: two waves of clusters fill an H100."""


def _fake_select_top_k(
    scores_TS: Tensor, key_start_T: Tensor, key_end_T: Tensor, k: int
) -> Tensor:
    """Shape and dtype of the result, for tracing."""
    return scores_TS.new_empty((scores_TS.shape[0], k), dtype=torch.int32)


def _fake_select_top_k_split_rows(scores_TS: Tensor, key_end_T: Tensor, k: int) -> Tensor:
    """Shape and dtype of the result, for tracing."""
    return scores_TS.new_empty((scores_TS.shape[0], k), dtype=torch.int32)


register("select_top_k", _fake_select_top_k)
register("select_top_k_split_rows", _fake_select_top_k_split_rows)


def is_built() -> bool:
    """Return whether the extension is installed, loads and holds both operators."""
    operators = "select_top_k", "select_top_k_split_rows"
    return all(missing_reason(operator) is None for operator in operators)


def select_top_k(scores_TS: Tensor, key_start_T: Tensor, key_end_T: Tensor, k: int) -> Tensor:
    """Select the k largest scores of each row on the GPU; the same bits at every call.

    Nothing is read back to the host, so values cannot be refused: a range beyond the row is cut to
    it, and NaN counts as less than -inf (it is selected only when the row has nothing else left).
    Ties go to the lower key, and -0.0 equals +0.0.

    Args:
        scores_TS: Scores, float32, on a CUDA device. Rows may lie anywhere (stride(0) is free);
            keys of a row must be adjacent, or the tensor is copied first.
        key_start_T: First key that row t may select, int64, same device.
        key_end_T: One past the last such key, int64, same device. An empty range selects nothing.
        k: How many keys a row keeps, at least 1.

    Returns:
        indices_TK: int32, ascending in each row, -1 behind the last selected key.

    Raises:
        RuntimeError: The extension is not built, or the tensors are not on one CUDA device.
        TypeError: A tensor has another dtype.
        ValueError: A tensor has another shape, or k is less than 1.
    """
    check_built("select_top_k")
    _check_arguments(scores_TS, k, key_start_T=key_start_T, key_end_T=key_end_T)
    indices_TK: Tensor = torch.ops.megatron_keye.select_top_k(scores_TS, key_start_T, key_end_T, k)
    return indices_TK


def select_top_k_split_rows(scores_TS: Tensor, key_end_T: Tensor, k: int) -> Tensor:
    """Select as `select_top_k` does from key 0 on, each row split over eight thread blocks.

    For a few long rows, which would leave most of a GPU idle at one block per row.

    Args:
        scores_TS: Scores, float32, on a CUDA device; S at most MAX_KEYS_OF_SPLIT_ROW. Copied
            first unless contiguous.
        key_end_T: One past the last key that row t may select, int64, same device.
        k: How many keys a row keeps, at least 1.

    Returns:
        indices_TK: int32, ascending in each row, -1 behind the last selected key.

    Raises:
        RuntimeError: The extension is not built, or the tensors are not on one CUDA device.
        TypeError: A tensor has another dtype.
        ValueError: A tensor has another shape, rows are too long, or k is less than 1.
    """
    check_built("select_top_k_split_rows")
    _check_arguments(scores_TS, k, key_end_T=key_end_T)
    if scores_TS.shape[1] > MAX_KEYS_OF_SPLIT_ROW:
        raise ValueError(
            f"scores_TS: got rows of {scores_TS.shape[1]} keys, expected at most "
            f"{MAX_KEYS_OF_SPLIT_ROW}; take select_top_k"
        )
    indices_TK: Tensor = torch.ops.megatron_keye.select_top_k_split_rows(scores_TS, key_end_T, k)
    return indices_TK


def splits_rows(scores_TS: Tensor) -> bool:
    """Return whether `select_top_k_split_rows` takes such rows and is faster for so few."""
    num_rows, num_keys = scores_TS.shape
    return num_rows <= _SPLIT_ROWS_PAY_UP_TO and num_keys <= MAX_KEYS_OF_SPLIT_ROW


def _check_arguments(scores_TS: Tensor, k: int, **bounds: Tensor) -> None:
    """Refuse here what the extension would refuse, since its exceptions can't be relied on.

    On an H100 machine with torch 2.11.0+cu130 one thrown by the extension ended the process.
    """
    if not scores_TS.is_cuda:
        raise RuntimeError(
            f"scores_TS: got a tensor on {scores_TS.device}, expected one on a CUDA device"
        )
    if scores_TS.dtype != torch.float32:
        name = str(scores_TS.dtype).removeprefix("torch.")
        raise TypeError(f"scores_TS: got dtype {name}, expected float32")
    if scores_TS.ndim != 2:
        raise ValueError(f"scores_TS: got shape {tuple(scores_TS.shape)}, expected [T, S]")
    for name, bound_T in bounds.items():
        if bound_T.device != scores_TS.device:
            raise RuntimeError(
                f"{name}: got a tensor on {bound_T.device}, expected {scores_TS.device}, where "
                "scores_TS is"
            )
        if bound_T.dtype != torch.int64:
            raise TypeError(f"{name}: got {bound_T.dtype}, expected torch.int64")
        if bound_T.shape != scores_TS.shape[:1]:
            raise ValueError(
                f"{name}: got shape {tuple(bound_T.shape)}, expected ({scores_TS.shape[0]},)"
            )
    if k < 1:
        raise ValueError(f"k: got {k}, expected 1 or more")
