# SPDX-License-Identifier: Apache-2.0
"""The operators behind torch's scaled_dot_product_attention, forward and backward.

They are called by name because the public function gives no log-sum-exp, and chooses by an order
that other parts of a program may change.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head, B is 1.
"""

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

_logger = logging.getLogger(__name__)
_CUDNN_VERSION = 91501
"""First whose results are right for lengths that 128 does not divide (pytorch issue 169849)."""
_CUDNN_TOKENS = 4096
"""Of the shortest queries for cuDNN, which plans anew for every length it has not seen yet."""

Operator = Literal["cpu", "cuDNN", "FlashAttention"]
State = tuple[Any, ...]
"""What an operator's forward pass returns for its backward pass beside output and log-sum-exp."""
_aten = torch.ops.aten


def takes(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor) -> bool:
    """Return whether one of the operators takes such heads, and may be used."""
    if q_BHTC.device.type == "cpu":
        return True
    # Lengths are cut before an operator is chosen: a causal triangle has as many keys as queries.
    length = min(q_BHTC.shape[2], k_BGSC.shape[2])
    asked = _asked(*(each[:, :, :length] for each in (q_BHTC, k_BGSC, v_BGSC)), is_causal=True)
    return _cudnn_takes(asked) or can_use_flash_attention(asked)


def choose(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, *, is_causal: bool) -> Operator:
    """Return the operator that is fastest for such heads among those that take them."""
    if q_BHTC.device.type == "cpu":
        return "cpu"
    asked = _asked(q_BHTC, k_BGSC, v_BGSC, is_causal=is_causal)
    is_short = q_BHTC.shape[2] < _CUDNN_TOKENS and can_use_flash_attention(asked)
    operator: Operator = "FlashAttention"
    if _cudnn_takes(asked) and not is_short:
        operator = "cuDNN"
    _log_operator(operator)
    return operator


def attend(
    operator: Operator,
    q_BHTC: Tensor,
    k_BGSC: Tensor,
    v_BGSC: Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, State]:
    """Attend to all keys, or causally where there are as many of them as queries.

    Args:
        operator: From `choose`.
        q_BHTC: Queries.
        k_BGSC: Keys.
        v_BGSC: Values.
        is_causal: Whether the t-th query sees only the first t + 1 keys.
        scale: Factor of the logits.

    Returns:
        out_BHTC, the natural log-sum-exp lse_BHT, and the state for `attend_backward`.
    """
    heads = (q_BHTC, k_BGSC, v_BGSC)
    if operator == "cpu":
        function = _aten._scaled_dot_product_flash_attention_for_cpu
        out_BHTC, lse_BHT = function(*heads, is_causal=is_causal, scale=scale)
        return out_BHTC, lse_BHT, ()
    if operator == "cuDNN":
        function = _aten._scaled_dot_product_cudnn_attention
        out_BHTC, lse, *state = function(*heads, None, True, is_causal=is_causal, scale=scale)
        # cuDNN's has one more dimension, of size 1.
        return out_BHTC, lse.reshape(q_BHTC.shape[:3]), tuple(state[:-1])
    function = _aten._scaled_dot_product_flash_attention
    out_BHTC, lse_BHT, *state = function(*heads, is_causal=is_causal, scale=scale)
    return out_BHTC, lse_BHT, tuple(state[:-1])


def attend_backward(
    operator: Operator,
    dout_BHTC: Tensor,
    q_BHTC: Tensor,
    k_BGSC: Tensor,
    v_BGSC: Tensor,
    out_BHTC: Tensor,
    lse_BHT: Tensor,
    state: State,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    Output and log-sum-exp may be those over more keys than these: a probability is the exponential
    of a logit less the log-sum-exp, and its gradient needs the output's product with `dout_BHTC`,
    so each part of the keys has its own share of the gradients (Dao, FlashAttention-2, eq. 4).

    Args:
        operator: The one of the forward pass.
        dout_BHTC: Gradient of the output.
        q_BHTC: Queries.
        k_BGSC: Keys.
        v_BGSC: Values.
        out_BHTC: Output.
        lse_BHT: Natural log-sum-exp.
        state: From `attend`.
        is_causal: As in the forward pass.
        scale: Factor of the logits.
    """
    given = (dout_BHTC, q_BHTC, k_BGSC, v_BGSC, out_BHTC)
    if operator == "cpu":
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = backward(*given, lse_BHT, 0.0, is_causal, scale=scale)
    elif operator == "cuDNN":
        lengths, (seed, offset) = state[:4], state[4:]
        backward = _aten._scaled_dot_product_cudnn_attention_backward
        options = (lse_BHT[..., None], seed, offset, None, *lengths, 0.0, is_causal)
        gradients = backward(*given, *options, scale=scale)
    else:
        lengths, (seed, offset) = state[:4], state[4:]
        backward = _aten._scaled_dot_product_flash_attention_backward
        options = (lse_BHT, *lengths, 0.0, is_causal, seed, offset)
        gradients = backward(*given, *options, scale=scale)
    dq_BHTC, dk_BGSC, dv_BGSC = gradients
    return dq_BHTC, dk_BGSC, dv_BGSC


def _asked(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, *, is_causal: bool) -> SDPAParams:
    return SDPAParams(q_BHTC, k_BGSC, v_BGSC, None, 0.0, is_causal, True)


def _cudnn_takes(asked: SDPAParams) -> bool:
    return not _cudnn_fault() and can_use_cudnn_attention(asked)


@functools.cache
def _cudnn_fault() -> str:
    """Ask torch for its cuDNN once per process, and say if it can't be used.

    torch raises only when it is asked first, and answers afterwards as if nothing were wrong.
    """
    found: int | RuntimeError | None
    try:
        found = torch.backends.cudnn.version()
    except RuntimeError as error:
        found = error
    fault = cudnn_fault(found)
    if fault:
        _logger.warning("dense_attention: FlashAttention runs in place of cuDNN: %s", fault)
    return fault


def cudnn_fault(found: int | RuntimeError | None) -> str:
    """Return why cuDNN's attention must not run, "" if it may.

    Args:
        found: cuDNN's version as torch gives it, such as 91501; None without cuDNN; torch's error
            where an older library was loaded than torch is compiled for, as by Transformer Engine.
    """
    if found is None:
        return "torch has no cuDNN"
    if isinstance(found, RuntimeError):
        # The versions, less torch's advice.
        return " ".join(str(found).partition(". ")[0].split())
    if found < _CUDNN_VERSION:
        return f"got cuDNN {found}, expected {_CUDNN_VERSION} or later, whose results are right"
    return ""


@functools.cache
def _log_operator(name: str) -> None:
    """Name what runs once per process: at 128K cuDNN takes 254 ms, FlashAttention 435."""
    _logger.info("dense_attention: torch's %s runs", name)
