# SPDX-License-Identifier: Apache-2.0
"""Public function of the exact top-k selection: contract, checks and choice of implementation.

torch.topk is not enough: it promises no order among ties and knows no ranges, and training and
inference must select the same keys.

Shape letters: T queries, S keys, K selected keys.
"""

from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    check_dtypes,
    check_key_ranges,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.registration import composite, opaque
from megatron_keye.kernels.select_top_k import reference

IMPLEMENTATIONS = ("eager", "triton", "cuda")
"""What exists. The default is "cuda" where it is built, for float32 on a GPU, else "triton" on a
GPU in the types that it takes, else "eager". All give the same keys."""


def fastest_impl(scores: Tensor) -> str:
    """Return the fastest exact implementation where `scores` lie that reads nothing back.

    Both give the same keys, so callers on a GPU need not tell which of them ran.
    """
    if not scores.is_cuda:
        return "triton"
    is_built: bool = import_module("megatron_keye.kernels.select_top_k.cuda").is_built()
    return "cuda" if is_built else "triton"


@composite("select_top_k")
def select_top_k(
    scores_TS: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    *,
    impl: str | None = None,
) -> Tensor:
    """Select the k highest scores of each query's range, all of it when it holds at most k.

    Exact and deterministic: of equal scores the lower index wins, and -0.0 equals +0.0. A score
    of -inf inside the range ranks last but is a candidate, and NaN ranks below it, so that a step
    whose numbers are bad ends as others do and is judged as a whole. Not differentiable.

    Args:
        scores_TS: Any float type; what lies outside a query's range is never looked at.
        key_start_T: int64, first key that a query may see, at least 0.
        key_end_T: int64, one past the last key that it may see, at most S; at or below
            `key_start_T` for a query without any key.
        k: Keys K to select, 1 or more; may exceed S.
        impl: One of IMPLEMENTATIONS, or None for the default. "cuda" takes float32 scores on a
            GPU, "triton" float32, bfloat16 and float16; both read nothing back to the host.

    Returns:
        indices_TK, int32: ascending in each row, then -1 up to K.

    Raises:
        ValueError: On shapes, types or devices that do not fit, k below 1, or an unknown
            `impl`.
        RuntimeError: When "cuda" is asked for and its extension is not built.
    """
    takes_triton = suits_triton(scores_TS)
    takes_cuda = scores_TS.dtype == torch.float32 and fastest_impl(scores_TS) == "cuda"
    chosen = choose_impl(
        "select_top_k", impl, IMPLEMENTATIONS, triton=takes_triton, cuda=takes_cuda
    )
    check_shapes(scores_TS=scores_TS)
    check_dtypes(FLOAT_DTYPES, scores_TS=scores_TS)
    check_key_ranges(scores_TS, key_start_T, key_end_T)
    if k < 1:
        raise ValueError(f"k: got {k}, expected 1 or more; set model.decoder.indexer.top_k")
    return _select(scores_TS.detach(), key_start_T, key_end_T, k, chosen)


def _fake_select(
    scores_TS: Tensor, key_start_T: Tensor, key_end_T: Tensor, k: int, *_: object
) -> Tensor:
    return scores_TS.new_empty((scores_TS.shape[0], k), dtype=torch.int32)


@opaque("select_top_k_as", _fake_select)
def _select(
    scores_TS: Tensor, key_start_T: Tensor, key_end_T: Tensor, k: int, impl: str
) -> Tensor:
    """Return indices_TK of an implementation."""
    if impl == "eager":
        return reference.select_top_k(scores_TS, key_start_T, key_end_T, k)
    # Loaded on demand: everything else must import without Triton and the compiled extension.
    implementation = import_module(f"megatron_keye.kernels.select_top_k.{impl}")
    indices_TK: Tensor = implementation.select_top_k(scores_TS, key_start_T, key_end_T, k)
    return indices_TK
