# SPDX-License-Identifier: Apache-2.0
"""An independent implementation of the whole model in float64 NumPy, for comparison.

It shares no code with the library and reads only config.json and a released checkpoint's tensors.

Shape letters: T tokens, D decoder width, H query heads, G key-value heads, C channels of a head,
I / J indexer heads and channels, E experts, P patches, W vision width, M merged tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Weights = Mapping[str, Array]
Config = Mapping[str, Any]

_exact_error_function = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Row:
    """One packed row."""

    token_ids: Integers
    positions: Integers
    """[3, T]."""
    bounds: list[int]
    image_patches: Array
    image_patch_grids: list[tuple[int, int]]
    video_patches: Array
    video_patch_grids: list[tuple[int, int]]
    targets: Integers

    def may_see(self) -> NDArray[np.bool_]:
        """Return [T, T]: causal within each document."""
        document = np.searchsorted(self.bounds, np.arange(len(self.token_ids)), side="right")
        same = document[:, None] == document[None, :]
        return same & np.tri(len(document), dtype=bool)


def run_model(weights: Weights, config: Config, row: Row, *, is_sparse: bool) -> dict[str, Any]:
    """Return the results of a forward pass, named as in the dump of verify; KL as "kl"."""
    hidden = weights["model.embed_tokens.weight"][row.token_ids].copy()
    images = embed_pictures(weights, config, row.image_patches, row.image_patch_grids)
    videos = embed_pictures(weights, config, row.video_patches, row.video_patch_grids)
    hidden[row.token_ids == config["image_token_id"]] = images
    hidden[row.token_ids == config["video_token_id"]] = videos
    layers: dict[str, list[Any]] = {"hidden": [], "topk_indices": [], "kl": []}
    for layer in range(config["num_hidden_layers"]):
        params = _below(weights, f"model.layers.{layer}.")
        hidden, selected, divergence = decoder_layer(
            params, config, hidden, row, is_sparse=is_sparse
        )
        layers["hidden"].append(hidden)
        layers["topk_indices"].append(selected)
        layers["kl"].append(divergence)
    eps = config["rms_norm_eps"]
    logits = rms_norm(hidden, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
    stacked = {name: np.stack(parts) for name, parts in layers.items()}
    return {
        "logits": logits,
        "image_embeds": images,
        "video_embeds": videos,
        "lm_loss": language_loss(logits, row.targets),
        **stacked,
    }


def decoder_layer(
    weights: Weights, config: Config, hidden: Array, row: Row, *, is_sparse: bool
) -> tuple[Array, Integers, Array]:
    """Return hidden states [T, D], selected keys [T, K] and the KL [G] summed over queries."""
    eps, top_k = config["rms_norm_eps"], config["sa_config"]["topk"]
    normed = rms_norm(hidden, weights["input_layernorm.weight"], eps)
    scores = indexer_scores(
        _below(weights, "self_attn.sa_indexer."), config, normed, row.positions
    )
    may_see = row.may_see()
    selected = select(scores, may_see, top_k)
    keys = chosen_mask(selected, len(hidden)) if is_sparse else may_see
    mixed, target = attention(_below(weights, "self_attn."), config, normed, row.positions, keys)
    hidden = hidden + mixed
    normed = rms_norm(hidden, weights["post_attention_layernorm.weight"], eps)
    hidden = hidden + experts(_below(weights, "mlp."), config, normed)
    return hidden, selected, divergence(target, scores, keys).sum(axis=0)


def indexer_scores(weights: Weights, config: Config, normed: Array, positions: Integers) -> Array:
    """Return I(t, s) for all pairs [T, T], scaled by J^-0.5 and not by I^-0.5."""
    heads, width = (config["sa_config"][f"indexer_{name}"] for name in ("num_heads", "head_dim"))
    projected = normed @ weights["q_proj.weight"].T
    gates = projected[:, heads * width :]
    q = projected[:, : heads * width].reshape(-1, heads, width)
    q = rms_norm(q, weights["q_norm.weight"], 1e-6)
    k = layer_norm(normed @ weights["k_proj.weight"].T, weights, "k_norm", 1e-6)
    sections = [int(s * width / config["head_dim"]) for s in mrope_sections(config)]
    q = rotate(q, positions, sections, config["rope_theta"])
    k = rotate(k[:, None], positions, sections, config["rope_theta"])[:, 0]
    rectified = np.maximum(np.einsum("tij,sj->tis", q, k), 0)
    return np.einsum("ti,tis->ts", gates, rectified) * width**-0.5


def select(scores: Array, may_see: NDArray[np.bool_], top_k: int) -> Integers:
    """Return the best visible keys of each query, ascending, -1 after them; ties: lower index."""
    selected = np.full((len(scores), top_k), -1)
    for query, row in enumerate(scores):
        visible = np.flatnonzero(may_see[query])
        best = sorted(sorted(visible, key=lambda key: (-row[key], key))[:top_k])
        selected[query, : len(best)] = best
    return selected


def chosen_mask(selected: Integers, num_keys: int) -> NDArray[np.bool_]:
    """Return [T, S], True where a key is selected."""
    mask = np.zeros((len(selected), num_keys + 1), dtype=bool)
    np.put_along_axis(mask, selected, True, axis=1)
    return mask[:, :num_keys]


def attention(
    weights: Weights, config: Config, normed: Array, positions: Integers, keys: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Return the output [T, D] and each group's mean attention weights [T, G, S]."""
    width, groups = config["head_dim"], config["num_key_value_heads"]
    eps, theta, sections = config["rms_norm_eps"], config["rope_theta"], mrope_sections(config)
    q, k, v = (
        (normed @ weights[f"{name}_proj.weight"].T).reshape(len(normed), -1, width)
        for name in "qkv"
    )
    q = rotate(rms_norm(q, weights["q_norm.weight"], eps), positions, sections, theta)
    k = rotate(rms_norm(k, weights["k_norm.weight"], eps), positions, sections, theta)
    each = q.shape[1] // groups
    k, v = np.repeat(k, each, axis=1), np.repeat(v, each, axis=1)
    share = softmax(np.einsum("thc,shc->ths", q, k) * width**-0.5, keys[:, None])
    mixed = np.einsum("ths,shc->thc", share, v).reshape(len(normed), -1)
    summed = share.reshape(len(normed), groups, each, -1).sum(axis=2)
    return mixed @ weights["o_proj.weight"].T, summed / summed.sum(axis=2, keepdims=True)


def divergence(target: Array, scores: Array, keys: NDArray[np.bool_]) -> Array:
    """Return KL(target || softmax of the scores over the keys) [T, G]."""
    predicted = softmax(scores, keys)[:, None]
    ratio = np.log(np.where(target > 0, target, 1)) - np.log(np.where(predicted > 0, predicted, 1))
    return (target * ratio).sum(axis=2)


def experts(weights: Weights, config: Config, normed: Array) -> Array:
    """Return the experts' weighted sum [T, D]: softmax over all, top-k, renormalised."""
    width = config["moe_intermediate_size"]
    shares = softmax(normed @ weights["gate.weight"].T, np.array(True))
    out = np.zeros_like(normed)
    for token, share in enumerate(shares):
        best = np.argsort(-share)[: config["num_experts_per_tok"]]
        for expert in best:
            both = normed[token] @ weights["experts.gate_up_proj"][expert]
            gate, up = both[:width], both[width:]
            inner = gate / (1 + np.exp(-gate)) * up
            part = inner @ weights["experts.down_proj"][expert]
            out[token] += share[expert] / share[best].sum() * part
    return out


def embed_pictures(
    weights: Weights, config: Config, patches: Array, patch_grids: list[tuple[int, int]]
) -> Array:
    """Return the embeddings [M, D] of consecutive pictures."""
    start, embeddings = 0, [np.empty((0, config["hidden_size"]))]
    for patch_grid in patch_grids:
        size = patch_grid[0] * patch_grid[1]
        features = encode(
            _below(weights, "visual.vision_model."), config, patches[start:][:size], patch_grid
        )
        embeddings.append(project(_below(weights, "mlp_AR."), config, features, patch_grid))
        start += size
    return np.concatenate(embeddings)


def encode(weights: Weights, config: Config, patches: Array, patch_grid: tuple[int, int]) -> Array:
    """Return the features [P, W] of one picture."""
    vision = config["vision_config"]
    eps, embeddings = vision["layer_norm_eps"], _below(weights, "embeddings.")
    kernel = embeddings["patch_embedding.weight"]
    hidden = patches.reshape(len(patches), -1) @ kernel.reshape(len(kernel), -1).T
    hidden = hidden + embeddings["patch_embedding.bias"]
    hidden = hidden + interpolate(embeddings["position_embedding.weight"], patch_grid)
    for layer in range(vision["num_hidden_layers"]):
        params = _below(weights, f"encoder.layers.{layer}.")
        normed = layer_norm(hidden, params, "layer_norm1", eps)
        hidden = hidden + patch_attention(_below(params, "self_attn."), vision, normed, patch_grid)
        widened = linear(layer_norm(hidden, params, "layer_norm2", eps), params, "mlp.fc1")
        cubic = math.sqrt(2 / math.pi) * (widened + 0.044715 * widened**3)
        hidden = hidden + linear(0.5 * widened * (1 + np.tanh(cubic)), params, "mlp.fc2")
    return layer_norm(hidden, weights, "post_layernorm", eps)


def interpolate(table: Array, patch_grid: tuple[int, int]) -> Array:
    """Interpolate a square table [side^2, W] bilinearly; centres are at half-integers."""
    side = math.isqrt(len(table))
    square = table.reshape(side, side, -1)
    for axis, size in enumerate(patch_grid):
        place = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, side - 1)
        share = (place - low).reshape([-1 if d == axis else 1 for d in range(3)])
        square = square.take(low, axis) * (1 - share) + square.take(high, axis) * share
    return square.reshape(patch_grid[0] * patch_grid[1], -1)


def patch_attention(
    weights: Weights, vision: Config, normed: Array, patch_grid: tuple[int, int]
) -> Array:
    """Return attention among all patches of one picture, rotated by row and column."""
    heads = vision["num_attention_heads"]
    q, k, v = (
        linear(normed, weights, f"{name}_proj").reshape(len(normed), heads, -1) for name in "qkv"
    )
    quarter = q.shape[-1] // 4
    frequencies = vision.get("rope_theta", 1e4) ** (-np.arange(quarter) / quarter)
    rows, columns = np.divmod(np.arange(len(normed)), patch_grid[1])
    angles = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1)
    q, k = rotate_pairs(q, angles), rotate_pairs(k, angles)
    share = softmax(np.einsum("phc,qhc->phq", q, k) * q.shape[-1] ** -0.5, np.array(True))
    mixed = np.einsum("phq,qhc->phc", share, v).reshape(len(normed), -1)
    return linear(mixed, weights, "out_proj")


def project(
    weights: Weights, config: Config, features: Array, patch_grid: tuple[int, int]
) -> Array:
    """Return vision tokens [M, D]: cells row by row, the norm after the merge, exact GELU."""
    merge = config["vision_config"]["spatial_merge_size"]
    square = features.reshape(*patch_grid, -1)
    cells = [
        square[top : top + merge, left : left + merge].reshape(-1)
        for top in range(0, patch_grid[0], merge)
        for left in range(0, patch_grid[1], merge)
    ]
    widened = linear(layer_norm(np.stack(cells), weights, "pre_norm", 1e-5), weights, "linear_1")
    exact = 0.5 * widened * (1 + _exact_error_function(widened / math.sqrt(2)))
    return linear(exact, weights, "linear_2")


def rotate(x: Array, positions: Integers, sections: list[int], theta: float) -> Array:
    """Rotate [T, H, C] by 3-D positions; contiguous sections of time, height, width."""
    half = x.shape[-1] // 2
    assert sum(sections) == half, "sections fill half a head"
    axis = np.repeat([0, 1, 2], sections)
    return rotate_pairs(x, positions[axis].T * theta ** (-2 * np.arange(half) / (2 * half)))


def rotate_pairs(x: Array, angles: Array) -> Array:
    """Rotate channel pairs (i, i + C/2) of [T, H, C] by angles [T, C/2]."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def mrope_sections(config: Config) -> list[int]:
    """Return the M-RoPE sections of the attention."""
    sections: list[int] = config["rope_scaling"]["mrope_section"]
    return sections


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Divide by the root mean square of the last dimension, then scale."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def layer_norm(x: Array, weights: Weights, name: str, eps: float) -> Array:
    """Standardise the last dimension, then scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Array, weights: Weights, name: str) -> Array:
    """Apply a linear map with bias."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def softmax(logits: Array, mask: NDArray[np.bool_]) -> Array:
    """Return the softmax over the last dimension where the mask holds, 0 elsewhere."""
    kept = np.where(mask, logits, -np.inf)
    raised = np.exp(kept - kept.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def language_loss(logits: Array, targets: Integers) -> float:
    """Return the mean cross entropy over targets other than -100."""
    queries = np.flatnonzero(targets != -100)
    shares = softmax(logits[queries], np.array(True))
    return float(-np.log(shares[np.arange(len(queries)), targets[queries]]).mean())


def _below(weights: Weights, prefix: str) -> dict[str, Array]:
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
