# SPDX-License-Identifier: Apache-2.0
"""Independent definitions of the operators, as plain loops in float64, and test inputs.

The loops follow the formulas entry by entry and share no code with the library, so that its
references are tested against something else than themselves.

Shape letters: T queries, S keys, I indexer heads, J indexer channels, H query heads,
G key-value heads, C channels of a head, K selected keys.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def make_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers drawn from `seed`, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def device(impl: str) -> torch.device:
    """Return the device on which tests run `impl`: for Triton a GPU if there is one, else CPU."""
    on_gpu = impl == "triton" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def moved[Tensors: tuple[Tensor, ...]](tensors: Tensors, impl: str) -> Tensors:
    """Return the tensors on the device where `impl` is tested."""
    return type(tensors)(tensor.to(device(impl)) for tensor in tensors)


def make_selection(kind: str, num_queries: int, num_keys: int, k: int, seed: int) -> Tensor:
    """Return a random selection int32 [T, K] for the last T positions of a causal row.

    Args:
        kind: "uniform" draws from all visible keys. "local" draws for the 16 queries of a tile
            from one pool of 4 k keys, whose union is about 4 k, and of which the next tile keeps
            nine in ten. Keys drawn twice leave some entries of a query empty.
        num_queries: T.
        num_keys: S.
        k: K.
        seed: Seed of the random draws, which run on a GPU if there is one.
    """
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(where).manual_seed(seed)
    selected = []
    rows_of_all = torch.arange(num_keys - num_queries, num_keys, device=where)
    for rows in torch.split(rows_of_all, 4096):
        visible_T1 = rows[:, None] + 1
        # One draw from each of k equal parts, so that few are the same.
        slot_K = torch.arange(k, device=where)
        drawn_TK = torch.rand((len(rows), k), generator=generator, device=where)
        drawn_TK = (drawn_TK + slot_K) / k
        if kind == "local":
            member_TK = (drawn_TK * 4 * k).long()
            tile_T1 = rows[:, None] // 16
            epoch_TK = (tile_T1 + member_TK) // 10
            # Spread evenly over the keys of the tile's first query by multiplicative hashing.
            hashed_TK = (member_TK * 2_654_435_761 + epoch_TK * 40_503_000_001) % 1_000_003
            drawn_TK = hashed_TK / 1_000_003 * (16 * tile_T1 + 1) / visible_T1
        key_TK = (drawn_TK * visible_T1).long().clamp(max=num_keys - 1).sort(dim=1).values
        key_TK[:, 1:][key_TK[:, 1:] == key_TK[:, :-1]] = num_keys
        key_TK = torch.where(visible_T1 <= k, slot_K.expand_as(key_TK), key_TK)
        key_TK = key_TK.masked_fill(key_TK >= visible_T1, num_keys).sort(dim=1).values
        selected.append(key_TK.masked_fill(key_TK == num_keys, -1).int())
    return torch.cat(selected).cpu()


def trainable[Tensors: tuple[Tensor, ...]](tensors: Tensors) -> Tensors:
    """Return `tensors` after setting requires_grad."""
    for tensor in tensors:
        tensor.requires_grad_()
    return tensors


def document_ranges(*lengths: int) -> tuple[Tensor, Tensor]:
    """Return int64 key_start_T and key_end_T of causal documents packed into one row."""
    starts: list[int] = []
    ends: list[int] = []
    offset = 0
    for length in lengths:
        starts += [offset] * length
        ends += range(offset + 1, offset + length + 1)
        offset += length
    return torch.tensor(starts), torch.tensor(ends)


BRANCHES = ((11, -1), (7, 0), (5, 1), (9, 1), (3, 0), (13, 0), (8, -1), (2, 6), (4, 6))
"""Tokens and parent of each branch: two documents, with branches of branches and without."""


def branched_ranges(
    branches: Sequence[tuple[int, int]] = BRANCHES,
) -> tuple[tuple[Tensor, Tensor], Tensor, list[list[int]]]:
    """Return ranges, int64 key_reach_S, and the keys on each query's path, found by its parents.

    Args:
        branches: Tokens and parent, -1 for the start of a document; in the order of the row.
    """
    paths: list[list[int]] = []
    keys_of_query: list[list[int]] = []
    for length, parent in branches:
        path = list(paths[parent]) if parent >= 0 else []
        for _ in range(length):
            path.append(len(keys_of_query))
            keys_of_query.append(list(path))
        paths.append(path)
    reach = [0] * len(keys_of_query)
    for query, keys in enumerate(keys_of_query):
        for key in keys:
            reach[key] = query + 1
    starts = torch.tensor([keys[0] for keys in keys_of_query])
    ends = torch.arange(1, len(keys_of_query) + 1)
    return (starts, ends), torch.tensor(reach), keys_of_query


def odd_ranges(num_queries: int, num_keys: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random ranges: every fifth is empty, the first reversed, the last has all keys."""
    generator = torch.Generator().manual_seed(seed)
    start_T = torch.randint(0, num_keys, (num_queries,), generator=generator)
    length_T = torch.randint(0, num_keys, (num_queries,), generator=generator)
    end_T = (start_T + length_T).clamp(max=num_keys)
    end_T[::5] = start_T[::5]
    start_T[0], end_T[0] = num_keys, 0
    start_T[-1], end_T[-1] = 0, num_keys
    return start_T, end_T


def odd_selection(num_queries: int, num_keys: int, k: int, seed: int) -> Tensor:
    """Return int32 [T, K] ascending distinct keys; rows 0, 1, 2, ... hold 0, 1, 2, ... of them."""
    generator = torch.Generator().manual_seed(seed)
    indices_TK = torch.full((num_queries, k), -1, dtype=torch.int32)
    for query in range(num_queries):
        num_selected = min(query, k, num_keys)
        chosen = torch.randperm(num_keys, generator=generator)[:num_selected]
        indices_TK[query, :num_selected] = chosen.sort().values.int()
    return indices_TK


def to_float64(tensor: Tensor) -> Array:
    """Return a detached float64 copy as an array."""
    array: Array = tensor.detach().double().cpu().numpy().copy()
    return array


def loop_scores(
    q_TIJ: Tensor, k_SJ: Tensor, gate_TI: Tensor, key_start_T: Tensor, key_end_T: Tensor
) -> Array:
    """Return the indexer's scores [T, S], pair by pair."""
    q, k, gate = to_float64(q_TIJ), to_float64(k_SJ), to_float64(gate_TI)
    scores = np.full((q.shape[0], k.shape[0]), -np.inf)
    for query in range(q.shape[0]):
        for key in range(int(key_start_T[query]), int(key_end_T[query])):
            total = 0.0
            for head in range(q.shape[1]):
                total += gate[query, head] * max(float(q[query, head] @ k[key]), 0.0)
            scores[query, key] = total / np.sqrt(q.shape[2])
    return scores


def loop_top_k(scores: Array, key_start_T: Tensor, key_end_T: Tensor, k: int) -> Indices:
    """Return the selected keys [T, K] by Python's sort over (-score, key)."""
    selected = np.full((scores.shape[0], k), -1, dtype=np.int64)
    for query in range(scores.shape[0]):
        keys = range(int(key_start_T[query]), int(key_end_T[query]))
        best = sorted(sorted(keys, key=lambda key: (-scores[query, key], key))[:k])
        selected[query, : len(best)] = best
    return selected


def softmax(logits: Array) -> Array:
    """Return the softmax of a vector."""
    weights: Array = np.exp(logits - logits.max())
    return weights / weights.sum()


def loop_attention(
    q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, keys_of_query: list[list[int]], scale: float
) -> tuple[Array, Array]:
    """Return attention [T, H, C] and group-averaged weights [T, G, S] over the listed keys."""
    q, k, v = to_float64(q_THC), to_float64(k_SGC), to_float64(v_SGC)
    heads_per_group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape[:2] + v.shape[2:])
    target = np.zeros((q.shape[0], k.shape[1], k.shape[0]))
    for query, keys in enumerate(keys_of_query):
        for head in range(q.shape[1]):
            if not keys:
                continue
            group = head // heads_per_group
            weights = softmax(k[keys, group] @ q[query, head] * scale)
            out[query, head] = weights @ v[keys, group]
            np.add.at(target[query, group], keys, weights / heads_per_group)
    return out, target


def listed(indices_TK: Tensor) -> list[list[int]]:
    """Return the selected keys of each query, without -1."""
    return [[key for key in row if key >= 0] for row in indices_TK.tolist()]


def ranges_listed(key_start_T: Tensor, key_end_T: Tensor) -> list[list[int]]:
    """Return the keys of each range."""
    pairs = zip(key_start_T.tolist(), key_end_T.tolist(), strict=True)
    return [list(range(start, end)) for start, end in pairs]


def loop_divergence(target: Array, scores: Array, keys_of_query: list[list[int]]) -> Array:
    """Return KL(target || softmax of scores) [T, G] over the listed keys of [T, G, S], [T, S]."""
    divergence = np.zeros(target.shape[:2])
    for query, keys in enumerate(keys_of_query):
        for group in range(target.shape[1] if keys else 0):
            predicted = softmax(scores[query, keys])
            for p, q in zip(target[query, group, keys], predicted, strict=True):
                if p > 0:
                    divergence[query, group] += p * np.log(p / q)
    return divergence


def assert_close(actual: Tensor, expected: Array | Tensor, tolerance: float) -> None:
    """Fail unless all entries agree within `tolerance`, absolute and relative; inf equals inf."""
    if isinstance(expected, Tensor):
        expected = to_float64(expected)
    np.testing.assert_allclose(to_float64(actual), expected, rtol=tolerance, atol=tolerance)


def assert_norm_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless the error's norm is within `tolerance` of the norm of `expected`; NaN fails."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = float((actual - expected).norm())
    limit = tolerance * float(expected.norm()) + 1e-30
    assert error <= limit, f"error {error:.3e}, expected at most {limit:.3e}"


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a fixed random weighting of the finite entries of `output`."""
    weights = make_tensor(*output.shape, seed=99).to(output)
    finite = output.isfinite()
    return torch.autograd.grad((output[finite] * weights[finite]).sum(), inputs)
