"""Dense attention through torch's scaled_dot_product_attention, where the ranges allow it.

torch's fast backends know a causal document, not a range for each query. A row that consists of
causal documents is cut into them; any other row has no such form.

Shape letters: T queries, S keys, H query heads, G key-value heads, C channels of a head, B is 1.
"""

import weakref
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

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


def dense_attention(
    q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, lengths: list[int], *, scale: float
) -> Tensor:
    """Return out_THC; see api.dense_attention.

    Args:
        q_THC: Queries.
        k_SGC: Keys.
        v_SGC: Values.
        lengths: Of the documents, in order; they add up to T.
        scale: Factor of the logits.
    """
    pieces = []
    for q, k, v in zip(
        q_THC.split(lengths), k_SGC.split(lengths), v_SGC.split(lengths), strict=True
    ):
        q_BHTC, k_BGTC, v_BGTC = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out_BHTC = scaled_dot_product_attention(
            q_BHTC, k_BGTC, v_BGTC, is_causal=True, scale=scale, enable_gqa=True
        )
        pieces.append(out_BHTC[0].transpose(0, 1))
    return torch.cat(pieces)
