"""Dense attention through the operators behind torch's scaled_dot_product_attention.

Those know a causal document, not a range for each query: a row that consists of causal documents
is cut into them, any other row has no such form. They are called by name because the public
function gives no log-sum-exp, and chooses by an order that other parts of a program may change.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head, B is 1.
"""

import functools
import logging
import weakref
from collections.abc import MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_keye.kernels.kept_outputs import KeepsOperator, KeptOutputs

_logger = logging.getLogger(__name__)
_CUDNN_VERSION = 91501
"""First whose results are right for lengths that 128 does not divide (pytorch issue 169849)."""
_CUDNN_TOKENS = 4096
"""Of the shortest document for cuDNN, which plans anew for every length it has not seen yet."""
_Ranges = tuple[weakref.ref[Tensor], int, int, int]
_remembered: MutableMapping[Tensor, tuple[_Ranges, list[int]]] = WeakTensorKeyDictionary()
"""Ends of ranges -> (starts and versions, lengths of documents): all layers of a row ask again."""


def document_lengths(key_start_T: Tensor, key_end_T: Tensor, num_keys: int) -> list[int]:
    """Return the lengths of the causal documents that the row consists of, or [] if it does not.

    Reads the answer back to the host, once for each `key_end_T`.

    Args:
        key_start_T: int64, first visible key of each query.
        key_end_T: int64, one past the last visible key.
        num_keys: S.
    """
    asked = weakref.ref(key_start_T), key_start_T._version, key_end_T._version, num_keys
    known = _remembered.get(key_end_T)
    if known is not None and known[0][0]() is key_start_T and known[0][1:] == asked[1:]:
        return known[1]
    lengths: list[int] = []
    num_queries = len(key_end_T)
    if num_queries == num_keys and num_queries > 0:
        position_T = torch.arange(num_queries, device=key_end_T.device)
        is_first_T = key_start_T == position_T
        begun_T = torch.where(is_first_T, position_T, 0).cummax(0).values
        is_causal = (key_end_T == position_T + 1).all() & (key_start_T == begun_T).all()
        if bool(is_causal):
            first = is_first_T.nonzero().flatten().tolist()
            ends = [*first[1:], num_queries]
            lengths = [end - start for start, end in zip(first, ends, strict=True)]
    _remembered[key_end_T] = asked, lengths
    return lengths


def takes(q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor) -> bool:
    """Return whether one of the operators takes such a document, and may be used."""
    if q_THC.device.type == "cpu":
        return True
    asked = _asked(*(tensor.transpose(0, 1)[None] for tensor in (q_THC, k_SGC, v_SGC)))
    return _cudnn_takes(asked) or can_use_flash_attention(asked)


def dense_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    lengths: list[int],
    *,
    scale: float,
    kept: KeptOutputs | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out_THC and lse_TH; see api.dense_attention_with_lse.

    Args:
        q_THC: Queries.
        k_SGC: Keys.
        v_SGC: Values.
        lengths: Of the documents, in order; they add up to T.
        scale: Factor of the logits.
        kept: See api.dense_attention_with_lse.
    """
    outs_THC, lses_TH = [], []
    for q, k, v in zip(
        q_THC.split(lengths), k_SGC.split(lengths), v_SGC.split(lengths), strict=True
    ):
        q_BHTC, k_BGTC, v_BGTC = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out_BHTC, lse = _attend(q_BHTC, k_BGTC, v_BGTC, scale, kept)
        outs_THC.append(out_BHTC[0].transpose(0, 1))
        # cuDNN's has one more dimension, of size 1.
        lses_TH.append(lse.reshape(q_BHTC.shape[1:3]).T)
    return _joined(outs_THC), _joined(lses_TH).detach()


def _joined(documents: list[Tensor]) -> Tensor:
    """Return what belongs to the documents as one row; torch.cat would copy even a single one."""
    return documents[0] if len(documents) == 1 else torch.cat(documents)


def _attend(
    q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor, scale: float, kept: KeptOutputs | None
) -> list[Tensor]:
    """Return out_BHTC and the natural log-sum-exp of one causal document."""
    heads, operators = (q_BHTC, k_BGTC, v_BGTC), torch.ops.aten
    options: tuple[Any, ...] = ()
    if q_BHTC.device.type == "cpu":
        attend = operators._scaled_dot_product_flash_attention_for_cpu
    else:
        asked = _asked(*heads)
        is_short = q_BHTC.shape[2] < _CUDNN_TOKENS and can_use_flash_attention(asked)
        if _cudnn_takes(asked) and not is_short:
            _log_operator("cuDNN")
            attend, options = operators._scaled_dot_product_cudnn_attention, (None, True)
        else:
            _log_operator("FlashAttention")
            attend = operators._scaled_dot_product_flash_attention
    with nullcontext() if kept is None else KeepsOperator(attend, kept):
        return list(attend(*heads, *options, is_causal=True, scale=scale)[:2])


def _asked(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> SDPAParams:
    return SDPAParams(q_BHTC, k_BGTC, v_BGTC, None, 0.0, True, True)


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
