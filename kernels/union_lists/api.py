# SPDX-License-Identifier: Apache-2.0
"""Public function of the union lists: contract, checks and choice of implementation.

Neighbouring queries select mostly the same keys. Attention over their union under a mask loads
each key once per tile instead of once per query, and these loads are what bounds it.

Shape letters: T queries, S keys, K selected keys, B tiles of TILE_QUERIES queries, U places of
a union.
"""

from importlib import import_module

from torch import Tensor

from megatron_keye.kernels.arguments import (
    INDEX_DTYPES,
    check_dtypes,
    check_shapes,
)
from megatron_keye.kernels.implementations import choose_impl
from megatron_keye.kernels.registration import composite, opaque
from megatron_keye.kernels.union_lists import reference
from megatron_keye.kernels.union_lists.reference import UnionLists

IMPLEMENTATIONS = ("eager", "triton")
"""What exists; "triton" is the default on a GPU, "eager" elsewhere."""


def union_lists(indices_TK: Tensor, num_keys: int, *, impl: str | None = None) -> UnionLists:
    """Merge the selections of each tile of TILE_QUERIES neighbouring queries.

    The result is the same bits at every call, the unspecified places excepted.

    Args:
        indices_TK: int32 or int64 as `select_top_k` gives them: ascending and distinct in each
            row, then padding. Padding is every entry outside 0 <= index < `num_keys`; it is
            in no union.
        num_keys: S, 1 to 2^31 - 1 where a query selects anything.
        impl: One of IMPLEMENTATIONS, or None for the default.

    Returns:
        Keys, masks and counts; U = min(TILE_QUERIES * K, S), at least 1.

    Raises:
        ValueError: On shapes or types that do not fit, or an unknown `impl`.
        RuntimeError: A row is not ascending or holds a key twice; on a GPU this is a device-side
            assertion, since nothing is read back to the host.
    """
    return UnionLists(*_union_lists(indices_TK, num_keys, impl))


@composite("union_lists")
def _union_lists(
    indices_TK: Tensor, num_keys: int, impl: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what union_lists returns."""
    chosen = choose_impl("union_lists", impl, IMPLEMENTATIONS, triton=indices_TK.is_cuda)
    check_shapes(indices_TK=indices_TK)
    check_dtypes(INDEX_DTYPES, indices_TK=indices_TK)
    if not 0 <= num_keys < 2**31:
        raise ValueError(f"num_keys: got {num_keys}, expected 0 to 2^31 - 1, as keys are int32")
    if chosen == "triton":
        implementation = import_module("megatron_keye.kernels.union_lists.triton")
        lists: tuple[Tensor, Tensor, Tensor] = implementation.union_lists(indices_TK, num_keys)
        return lists
    return _merge(indices_TK, num_keys)


@opaque("merge_unions", reference.fake_union_lists)
def _merge(indices_TK: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unions of the eager form."""
    return reference.union_lists(indices_TK, num_keys)
