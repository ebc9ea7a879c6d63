# SPDX-License-Identifier: Apache-2.0
"""Dense attention through the operators behind torch's scaled_dot_product_attention.

Those know all keys or a causal triangle, not a range for each query. So queries are cut into
trapezoids, and each attends to the keys that all its queries see and to its triangle; these are
merged by their log-sum-exps (Milakov, Gimelshein: Online normalizer calculation for softmax).

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head, B is 1.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_keye.kernels.dense_attention import operators
from megatron_keye.kernels.dense_attention.operators import Operator, State
from megatron_keye.kernels.kept_outputs import KeptOutputs
from megatron_keye.kernels.trapezoids import Trapezoid


def takes(q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor) -> bool:
    """Return whether one of the operators takes such heads, and may be used."""
    return operators.takes(*map(_heads_first, (q_THC, k_SGC, v_SGC)))


def dense_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    trapezoids: list[Trapezoid],
    *,
    scale: float,
    kept: KeptOutputs | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH; see api.dense_attention_with_lse.

    Args:
        q_THC: Queries.
        k_SGC: Keys.
        v_SGC: Values.
        trapezoids: Of all queries, in order.
        scale: Factor of the logits.
        kept: See api.dense_attention_with_lse.
    """
    out_THC, lse_TH = _DenseAttention.apply(q_THC, k_SGC, v_SGC, trapezoids, scale, kept)
    return out_THC, lse_TH


class _DenseAttention(torch.autograd.Function):
    """All trapezoids at once, so that keys seen by several have one gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THC: Tensor,
        k_SGC: Tensor,
        v_SGC: Tensor,
        trapezoids: list[Trapezoid],
        scale: float,
        kept: KeptOutputs | None,
    ) -> tuple[Tensor, Tensor]:
        def attend() -> tuple[Any, ...]:
            return _attend_to_all(q_THC, k_SGC, v_SGC, trapezoids, scale)

        done = attend() if kept is None else kept.outputs_of("dense_attention", attend)
        out_THC, lse_TH, *ctx.blocks = done
        ctx.trapezoids, ctx.scale = trapezoids, scale
        ctx.save_for_backward(q_THC, k_SGC, v_SGC, out_THC, lse_TH)
        ctx.mark_non_differentiable(lse_TH)
        return out_THC, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_THC, k_SGC, v_SGC, out_THC, lse_TH = ctx.saved_tensors
        saved = q_THC, k_SGC, v_SGC, out_THC, lse_TH
        sums = _attend_backward(dout_THC, *saved, ctx.trapezoids, ctx.blocks, scale=ctx.scale)
        return *sums, None, None, None


def differentiate(
    dout_THC: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    trapezoids: list[Trapezoid],
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values from these alone: it attends once more."""
    heads = q_THC, k_SGC, v_SGC
    out_THC, lse_TH, *blocks = _attend_to_all(*heads, trapezoids, scale)
    return _attend_backward(dout_THC, *heads, out_THC, lse_TH, trapezoids, blocks, scale=scale)


def _attend_to_all(
    q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, trapezoids: list[Trapezoid], scale: float
) -> tuple[Any, ...]:
    """Return out_THC, lse_TH and each trapezoid's blocks."""
    done = [_attend(q_THC[each.queries], k_SGC, v_SGC, each, scale) for each in trapezoids]
    outs_THC, lses_TH, blocks = zip(*done, strict=True)
    return _joined(outs_THC), _joined(lses_TH), *blocks


def _attend_backward(
    dout_THC: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_TH: Tensor,
    trapezoids: list[Trapezoid],
    blocks_of_all: "list[list[_Block]]",
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    dq_THC, dk_SGC, dv_SGC = map(torch.zeros_like, (q_THC, k_SGC, v_SGC))
    for trapezoid, blocks in zip(trapezoids, blocks_of_all, strict=True):
        rows = trapezoid.queries
        dout_BHTC, q_BHTC, out_BHTC = (
            _heads_first(each[rows]) for each in (dout_THC, q_THC, out_THC)
        )
        lse_BHT = lse_TH[rows].T[None].contiguous()
        for block in blocks:
            k_BGSC, v_BGSC = (_heads_first(each[block.keys]) for each in (k_SGC, v_SGC))
            of_block = operators.attend_backward(
                block.operator,
                dout_BHTC,
                q_BHTC,
                k_BGSC,
                v_BGSC,
                out_BHTC,
                lse_BHT,
                block.state,
                is_causal=block.is_causal,
                scale=scale,
            )
            wholes = (dq_THC, rows), (dk_SGC, block.keys), (dv_SGC, block.keys)
            for (whole, place), part in zip(wholes, of_block, strict=True):
                whole[place] += part[0].transpose(0, 1)
    return dq_THC, dk_SGC, dv_SGC


class _Block(NamedTuple):
    """Some keys of a trapezoid, all of which its queries see, or the triangle."""

    keys: slice
    """Of the whole row."""
    is_causal: bool
    """Whether it is the triangle."""
    operator: Operator
    """What attended to them."""
    state: State
    """What its backward pass needs."""


def _attend(
    q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, trapezoid: Trapezoid, scale: float
) -> tuple[Tensor, Tensor, list[_Block]]:
    """Return out_THC and lse_TH of one trapezoid, and what its backward pass needs."""
    blocks = list[_Block]()
    if not trapezoid.sees_keys:
        lse_type = torch.promote_types(q_THC.dtype, torch.float32)
        lse_TH = q_THC.new_full(q_THC.shape[:2], torch.inf, dtype=lse_type)
        return torch.zeros_like(q_THC), lse_TH, blocks
    q_BHTC, parts = _heads_first(q_THC), list[tuple[Tensor, Tensor]]()
    cuts = [(keys, False) for keys in trapezoid.earlier_keys]
    for keys, is_causal in [*cuts, (trapezoid.triangle_keys, True)]:
        heads = q_BHTC, *(_heads_first(each[keys]) for each in (k_SGC, v_SGC))
        operator = operators.choose(*heads, is_causal=is_causal)
        out_BHTC, lse_BHT, state = operators.attend(
            operator, *heads, is_causal=is_causal, scale=scale
        )
        blocks.append(_Block(keys, is_causal, operator, state))
        parts.append((out_BHTC, lse_BHT))
    out_BHTC, lse_BHT = functools.reduce(_merge, parts)
    return out_BHTC[0].transpose(0, 1), lse_BHT[0].T, blocks


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the trapezoids' parts as one row; torch.cat would copy even a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return out_BHTC and lse_BHT over the keys of two blocks together."""
    (out_BHTC, lse_BHT), (other_BHTC, other_BHT) = one, other
    merged_BHT = torch.logaddexp(lse_BHT, other_BHT)
    share_BHT1 = torch.exp(other_BHT - merged_BHT)[..., None]
    wide = lse_BHT.dtype
    merged_BHTC = torch.lerp(out_BHTC.to(wide), other_BHTC.to(wide), share_BHT1)
    return merged_BHTC.to(out_BHTC.dtype), merged_BHT
