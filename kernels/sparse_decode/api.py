# SPDX-License-Identifier: Apache-2.0
"""Public function of the sparse decode: contract, checks and choice of implementation.

Inference over a paged cache. One operator from indexer queries to the attention's output, since
the gaps between launches would take longer than a new token's work.

Shape letters: B sequences, T new queries of each, I indexer heads, J indexer channels, H query
heads, G key-value heads, C channels of a head, K selected keys, P pages of the cache, L places of
a page, N pages of a sequence.
"""

from importlib import import_module

import torch
from torch import Tensor

from megatron_keye.kernels.arguments import (
    FLOAT_DTYPES,
    check_dtypes,
    check_groups,
    check_same_dtype,
    check_shapes,
)
from megatron_keye.kernels.head_quantization.api import HEAD_DTYPES
from megatron_keye.kernels.implementations import choose_impl, suits_triton
from megatron_keye.kernels.indexer_quantization.api import VECTOR_DTYPES
from megatron_keye.kernels.registration import composite, opaque
from megatron_keye.kernels.sparse_decode import reference
from megatron_keye.kernels.sparse_decode.reference import PagedCache

IMPLEMENTATIONS = ("eager", "triton", "cuda")
"""What exists; "triton" is the default on a GPU in the types that it takes, "eager" elsewhere.
"cuda" has to be asked for."""


def sparse_decode(
    q_BTIJ: Tensor,
    gate_BTI: Tensor,
    query_BTHC: Tensor,
    cache: PagedCache,
    k: int,
    *,
    scale: float,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with the newest T tokens of each sequence to the keys that their indexer selects.

    The new tokens' own keys and values are in the cache already. The last query of a sequence
    sees all of its keys, each earlier one a key fewer; a query without any key gives 0. Scores,
    selection and attention are those of `lightning_indexer` and `sparse_attention`; where both
    run as "triton", scores and selection agree bit for bit. Not differentiable.

    Args:
        q_BTIJ: Indexer queries, any float type.
        gate_BTI: Weight of each indexer head, any float type, any sign.
        query_BTHC: Attention queries, any float type; H a multiple of G.
        cache: Keys and values of the type of `query_BTHC`, or e4m3 with their scales, as
            `quantize_heads` of `head_quantization` returns them; `query_BTHC` is then not float16.
            Indexer keys of the type of `q_BTIJ`, or e4m3 with their scales, both as `quantize` of
            `indexer_quantization` returns them; `q_BTIJ` then comes from `round_to_fp8` and is
            not float16. What lies past a
            sequence's length is never loaded, nor is a page of -1, like every page outside
            0 <= page < P; a key below the length without a page ranks last and takes no part in
            the attention. A length counts at most N * L.
        k: Keys K to select, 1 or more; may exceed the length.
        scale: Factor of the attention's logits, usually C^-0.5.
        impl: One of IMPLEMENTATIONS, or None for the default. "triton" takes up to 64 indexer
            heads, groups of up to 64 heads and heads of up to 256 channels; it reads nothing
            back to the host, so a CUDA graph can hold it, and ranks NaN below -inf. So does
            "cuda", on Hopper with the extension: bfloat16 (and e4m3 indexer keys, of which NaN
            counts as 480), T up to 8, I up to 16, J = 64, H / G up to 16, C of 64 or 128, and
            pages of a power of two places, 16 or more.

    Returns:
        out_BTHC, type of `query_BTHC`, and indices_BTK, int32: the selected keys by their place
        in the sequence, ascending in each row, then -1 up to K.

    Raises:
        ValueError: On shapes, types or devices that do not fit, k below 1, a NaN score inside
            a range (eager only), or an unknown `impl`.

    Source: arXiv 2606.10651, lightning indexer and sparse attention.
    """
    return _decode(q_BTIJ, gate_BTI, query_BTHC, *cache, k, scale, impl)


@composite("sparse_decode")
def _decode(
    q_BTIJ: Tensor,
    gate_BTI: Tensor,
    query_BTHC: Tensor,
    keys_PLGC: Tensor,
    values_PLGC: Tensor,
    index_keys_PLJ: Tensor,
    pages_BN: Tensor,
    lengths_B: Tensor,
    index_scales_PL: Tensor | None,
    key_scales_PLG: Tensor | None,
    value_scales_PLG: Tensor | None,
    k: int,
    scale: float,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Return what sparse_decode returns."""
    cached = keys_PLGC, values_PLGC, index_keys_PLJ
    scales = index_scales_PL, key_scales_PLG, value_scales_PLG
    cache = PagedCache(*cached, pages_BN, lengths_B, *scales)
    takes_triton = suits_triton(q_BTIJ, gate_BTI, query_BTHC)
    chosen = choose_impl("sparse_decode", impl, IMPLEMENTATIONS, triton=takes_triton)
    _check(q_BTIJ, gate_BTI, query_BTHC, cache)
    if k < 1:
        raise ValueError(f"k: got {k}, expected 1 or more; set model.decoder.indexer.top_k")
    heads = q_BTIJ.detach(), gate_BTI.detach(), query_BTHC.detach()
    cached = keys_PLGC.detach(), values_PLGC.detach(), index_keys_PLJ.detach()
    return _decode_as(*heads, *cached, pages_BN, lengths_B, *scales, k, scale, chosen)


def _fake_decode(
    q_BTIJ: Tensor,
    gate_BTI: Tensor,
    query_BTHC: Tensor,
    keys_PLGC: Tensor,
    values_PLGC: Tensor,
    index_keys_PLJ: Tensor,
    pages_BN: Tensor,
    lengths_B: Tensor,
    index_scales_PL: Tensor | None,
    key_scales_PLG: Tensor | None,
    value_scales_PLG: Tensor | None,
    k: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    indices_BTK = pages_BN.new_empty((*q_BTIJ.shape[:2], k), dtype=torch.int32)
    return query_BTHC.new_empty(query_BTHC.shape), indices_BTK


@opaque("sparse_decode_as", _fake_decode)
def _decode_as(
    q_BTIJ: Tensor,
    gate_BTI: Tensor,
    query_BTHC: Tensor,
    keys_PLGC: Tensor,
    values_PLGC: Tensor,
    index_keys_PLJ: Tensor,
    pages_BN: Tensor,
    lengths_B: Tensor,
    index_scales_PL: Tensor | None,
    key_scales_PLG: Tensor | None,
    value_scales_PLG: Tensor | None,
    k: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return out_BTHC and indices_BTK of an implementation."""
    cached = keys_PLGC, values_PLGC, index_keys_PLJ
    scales = index_scales_PL, key_scales_PLG, value_scales_PLG
    cache = PagedCache(*cached, pages_BN, lengths_B, *scales)
    if impl != "eager":
        # Loaded on demand: everything else must import where Triton cannot compile.
        chosen = import_module(f"megatron_keye.kernels.sparse_decode.{impl}")
        result: tuple[Tensor, Tensor] = chosen.sparse_decode(
            q_BTIJ, gate_BTI, query_BTHC, cache, k, scale=scale
        )
        return result
    return reference.sparse_decode(q_BTIJ, gate_BTI, query_BTHC, cache, k, scale=scale)


def _check(q_BTIJ: Tensor, gate_BTI: Tensor, query_BTHC: Tensor, cache: PagedCache) -> None:
    """Raise unless all tensors fit."""
    tensors = {name: tensor for name, tensor in cache._asdict().items() if tensor is not None}
    sizes = check_shapes(q_BTIJ=q_BTIJ, gate_BTI=gate_BTI, query_BTHC=query_BTHC, **tensors)
    check_groups(sizes["H"], sizes["G"])
    if cache.index_scales_PL is None:
        check_same_dtype(q_BTIJ=q_BTIJ, index_keys_PLJ=cache.index_keys_PLJ)
    else:
        check_dtypes(VECTOR_DTYPES, q_BTIJ=q_BTIJ)
        check_dtypes((torch.float8_e4m3fn,), index_keys_PLJ=cache.index_keys_PLJ)
        check_dtypes((torch.float32,), index_scales_PL=cache.index_scales_PL)
    heads = {"keys_PLGC": cache.keys_PLGC, "values_PLGC": cache.values_PLGC}
    if cache.key_scales_PLG is None or cache.value_scales_PLG is None:
        if cache.key_scales_PLG is not cache.value_scales_PLG:
            raise ValueError(
                "key_scales_PLG, value_scales_PLG: got one of them, expected both or neither; "
                "quantize both keys and values"
            )
        check_same_dtype(query_BTHC=query_BTHC, **heads)
    else:
        check_dtypes(HEAD_DTYPES, query_BTHC=query_BTHC)
        check_dtypes((torch.float8_e4m3fn,), **heads)
        check_dtypes(
            (torch.float32,),
            key_scales_PLG=cache.key_scales_PLG,
            value_scales_PLG=cache.value_scales_PLG,
        )
    check_dtypes(FLOAT_DTYPES, gate_BTI=gate_BTI)
    check_dtypes((torch.int32,), pages_BN=cache.pages_BN)
    check_dtypes((torch.int64,), lengths_B=cache.lengths_B)
