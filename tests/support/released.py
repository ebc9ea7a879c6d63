# SPDX-License-Identifier: Apache-2.0
"""The released tensors of whole native weights, without the weight mapping of the package."""

import torch
from torch import Tensor

from megatron_keye.config import RunConfig

LAYERS = "decoder.block.layers."


def released(weights: dict[str, Tensor], run: RunConfig) -> dict[str, Tensor]:
    """Return the released tensors of whole native ones."""
    out = {
        "model.embed_tokens.weight": weights["decoder.embedding.weight"],
        "model.norm.weight": weights["decoder.block.final_layernorm.weight"],
        "lm_head.weight": weights["decoder.output_layer.weight"],
    }
    for name, weight in weights.items():
        name = name.replace("vision.encoder.", "visual.vision_model.", 1)
        name = name.replace("vision.projector.", "mlp_AR.", 1)
        if not name.startswith("decoder."):
            out[name] = weight
    for layer in range(run.model.decoder.num_layers):
        of_layer = {
            n.removeprefix(LAYERS): w[layer] for n, w in weights.items() if n.startswith(LAYERS)
        }
        out |= {f"model.layers.{layer}.{n}": w for n, w in released_layer(of_layer, run).items()}
    return out


def released_layer(weights: dict[str, Tensor], run: RunConfig) -> dict[str, Tensor]:
    decoder = run.model.decoder
    heads, size = decoder.num_heads // decoder.num_kv_heads, decoder.head_dim
    kinds: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for group in weights.pop("self_attention.linear_qkv.weight").chunk(decoder.num_kv_heads):
        kinds["q"].append(group[: heads * size])
        kinds["k"].append(group[heads * size : (heads + 1) * size])
        kinds["v"].append(group[(heads + 1) * size :])
    out = {f"self_attn.{kind}_proj.weight": torch.cat(parts) for kind, parts in kinds.items()}
    for half, name in (("fc1", "gate_up_proj"), ("fc2", "down_proj")):
        experts = weights.pop(f"mlp.experts.experts.linear_{half}.weight")
        out[f"mlp.experts.{name}"] = experts.transpose(1, 2)
    names = {
        "self_attention.linear_proj": "self_attn.o_proj",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "self_attention.indexer": "self_attn.sa_indexer",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.router": "mlp.gate",
    }
    for name, weight in weights.items():
        old = next((old for old in names if name.startswith(old)), None)
        out[name.replace(old, names[old]) if old else name] = weight
    return out
