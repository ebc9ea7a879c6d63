"""Public function of the exact top-k selection: contract, checks and choice of implementation.

torch.topk is not enough: it promises no order among ties and knows no ranges, and training and
inference must select the same keys.

Shape letters: T queries, S keys, K selected keys.
"""

from importlib import import_module

from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    check_dtypes,
    check_key_ranges,
    check_shapes,
    choose_impl,
)
from megatron_keye.kernels.select_top_k import reference

IMPLEMENTATIONS = ("eager", "cuda", "triton")
"""What exists; the first is the default. "cuda" needs the compiled extension and a GPU."""


def fastest_impl(scores: Tensor) -> str:
    """Return the fastest exact implementation where `scores` lie that reads nothing back.

    Both give the same keys, so callers on a GPU need not tell which of them ran.
    """
    is_built: bool = import_module("megatron_keye.kernels.select_top_k.cuda").is_built()
    return "cuda" if scores.is_cuda and is_built else "triton"


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
        impl: One of IMPLEMENTATIONS, or None for the first. "cuda" takes float32 scores on a GPU,
            "triton" float32, bfloat16 and float16; both read nothing back to the host.

    Returns:
        indices_TK, int32: ascending in each row, then -1 up to K.

    Raises:
        ValueError: On shapes, types or devices that do not fit, k below 1, or an unknown
            `impl`.
        RuntimeError: When "cuda" is asked for and its extension is not built.
    """
    chosen = choose_impl("select_top_k", impl, IMPLEMENTATIONS)
    check_shapes(scores_TS=scores_TS)
    check_dtypes(FLOAT_DTYPES, scores_TS=scores_TS)
    check_key_ranges(scores_TS, key_start_T, key_end_T)
    if k < 1:
        raise ValueError(f"k: got {k}, expected 1 or more; set model.decoder.indexer.top_k")
    if chosen == "cuda":
        # Loaded on demand: everything else must import without the compiled extension.
        cuda = import_module("megatron_keye.kernels.select_top_k.cuda")
        indices_TK: Tensor = cuda.select_top_k(scores_TS, key_start_T, key_end_T, k)
        return indices_TK
    if chosen == "triton":
        triton = import_module("megatron_keye.kernels.select_top_k.triton")
        selected_TK: Tensor = triton.select_top_k(scores_TS, key_start_T, key_end_T, k)
        return selected_TK
    return reference.select_top_k(scores_TS, key_start_T, key_end_T, k)
