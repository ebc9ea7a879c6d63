# SPDX-License-Identifier: Apache-2.0
"""Public function of the lightning indexer: contract, checks and choice of implementation.

Scoring and selecting are one operator here because the scores of a long row must never exist
all at once.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, K selected keys.
"""

import functools
from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    check_dtypes,
    check_key_ranges,
    check_key_reach,
    check_same_dtype,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.lightning_indexer import cuda, paths, reference
from megatron_keye.kernels.registration import composite, opaque

IMPLEMENTATIONS = ("eager", "triton", "cuda")
"""What exists. The default is "cuda" for long rows where it is built and takes the call, else
"triton" on a GPU in the types that it takes, else "eager"."""


@composite("lightning_indexer")
def lightning_indexer(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    *,
    key_reach_S: Tensor | None = None,
    is_rounded: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Select for each query the k keys of its range that the indexer scores highest.

    Equal to `select_top_k(indexer_scores(...), ..., k)`, ties and -0.0 included, but never holds
    more than a chunk of the score matrix. Not differentiable: the indexer learns through
    `selected_indexer_scores` and its loss.

    Args:
        q_TIJ: Indexer queries, any float type.
        k_SJ: The one key that all indexer heads share, type of `q_TIJ`.
        gate_TI: Weight of each head, any float type, any sign.
        key_start_T: int64, first key that a query may see, at least 0.
        key_end_T: int64, one past the last key that it may see, at most S; at or below
            `key_start_T` for a query without any key.
        k: Keys K to select, 1 or more; may exceed S. A score that is NaN ranks below -inf.
        key_reach_S: int64, for documents that branch: a query sees a key of its range only where
            `key_end_T` is at most this, and its selection is the one that it has alone. Ranges and
            reach are then read back to the host once. None: it sees all keys of its range.
        is_rounded: Whether queries and keys are what `round_to_fp8` of `indexer_quantization`
            returns. "cuda" then multiplies them as e4m3 numbers, which is faster, and sums with 14
            bits, so that keys whose scores differ by less may change places (see cuda.py); the
            others compute as ever.
        impl: One of IMPLEMENTATIONS, or None for the default. "triton" and "cuda" read nothing
            else back to the host. "triton" selects with the extension where that is built, with
            Triton otherwise; both give the same keys.
            "cuda" takes bfloat16, J = 64, up to 16 heads, S up to 262144 and k up to 2048, on a
            GPU of compute capability 9.0, and never writes the scores.

    Returns:
        indices_TK, int32: ascending in each row, then -1 up to K.

    Raises:
        ValueError: On shapes, types or devices that do not fit, k below 1, or an unknown
            `impl`.
        RuntimeError: When "cuda" is asked for and its extension is not built.

    Source: arXiv 2606.10651, lightning indexer and token selection.
    """
    check_shapes(q_TIJ=q_TIJ, k_SJ=k_SJ, gate_TI=gate_TI)
    check_same_dtype(q_TIJ=q_TIJ, k_SJ=k_SJ)
    check_dtypes(FLOAT_DTYPES, gate_TI=gate_TI)
    check_key_ranges(q_TIJ, key_start_T, key_end_T)
    check_key_reach(k_SJ, key_reach_S)
    if k < 1:
        raise ValueError(f"k: got {k}, expected 1 or more; set model.decoder.indexer.top_k")
    chosen = choose_impl(
        "lightning_indexer",
        impl,
        IMPLEMENTATIONS,
        triton=suits_triton(q_TIJ, k_SJ, gate_TI),
        cuda=cuda.suits(q_TIJ, k_SJ, k),
    )
    heads = q_TIJ.detach(), k_SJ.detach(), gate_TI.detach()
    return _select(*heads, key_start_T, key_end_T, key_reach_S, k, is_rounded, chosen)


def _fake_select(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    k: int,
    *_: object,
) -> Tensor:
    return q_TIJ.new_empty((q_TIJ.shape[0], k), dtype=torch.int32)


@opaque("lightning_indexer_as", _fake_select)
def _select(
    q_TIJ: Tensor,
    k_SJ: Tensor,
    gate_TI: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    key_reach_S: Tensor | None,
    k: int,
    is_rounded: bool,
    impl: str,
) -> Tensor:
    """Return indices_TK of an implementation."""
    inputs = q_TIJ, k_SJ, gate_TI, key_start_T, key_end_T, k
    if impl == "eager":
        return reference.lightning_indexer(*inputs, key_reach_S)
    # Loaded on demand: everything else must import where Triton cannot compile.
    implementation = import_module(f"megatron_keye.kernels.lightning_indexer.{impl}")
    select = implementation.lightning_indexer
    if impl == "cuda":
        select = functools.partial(select, is_rounded=is_rounded)
    if key_reach_S is not None:
        return paths.select_along_paths(select, *inputs, key_reach_S)
    indices_TK: Tensor = select(*inputs)
    return indices_TK
