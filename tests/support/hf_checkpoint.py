# SPDX-License-Identifier: Apache-2.0
"""Random Keye-VL checkpoints of tiny size in the released format."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

IMAGE, VIDEO, START, END = 90, 91, 92, 93
PATCH = 4

CONFIG: dict[str, Any] = {
    "architectures": ["KeyeVL2MoeForConditionalGeneration"],
    "model_type": "KeyeVL2",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 64,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 4]},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "fast_video_token_id": 94,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "dtype": "bfloat16",
    "sa_config": {
        "indexer_num_heads": 3,
        "indexer_head_dim": 8,
        "indexer_num_kv_heads": 1,
        "topk": 6,
        "q_chunk_size": 512,
        "kv_chunk_size": 512,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_channels": 3,
        "image_size": 20,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-4,
        "rope_theta": 100.0,
    },
}
"""Its dimensions differ in size, and its epsilons from the fixed ones, to expose mix-ups."""


def config_with(*, top_k: int = 6) -> dict[str, Any]:
    """Return CONFIG with `top_k` selected keys."""
    return CONFIG | {"sa_config": CONFIG["sa_config"] | {"topk": top_k}}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all tensors, with fused experts, for `config`."""
    width, size, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    keys, num_experts, inner = (
        config[f"num_{name}"] if name else config["moe_intermediate_size"]
        for name in ("key_value_heads", "experts", "")
    )
    indexer = config["sa_config"]
    index_heads, index_size = indexer["indexer_num_heads"], indexer["indexer_head_dim"]
    found = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "lm_head.weight": (config["vocab_size"], width),
    }
    for layer in range(config["num_hidden_layers"]):
        tensors = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (heads * size, width),
            "self_attn.k_proj.weight": (keys * size, width),
            "self_attn.v_proj.weight": (keys * size, width),
            "self_attn.o_proj.weight": (width, heads * size),
            "self_attn.q_norm.weight": (size,),
            "self_attn.k_norm.weight": (size,),
            "self_attn.sa_indexer.q_proj.weight": (index_heads * (index_size + 1), width),
            "self_attn.sa_indexer.k_proj.weight": (index_size, width),
            "self_attn.sa_indexer.q_norm.weight": (index_size,),
            "self_attn.sa_indexer.k_norm.weight": (index_size,),
            "self_attn.sa_indexer.k_norm.bias": (index_size,),
            "mlp.gate.weight": (num_experts, width),
            "mlp.experts.gate_up_proj": (num_experts, width, 2 * inner),
            "mlp.experts.down_proj": (num_experts, inner, width),
        }
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in tensors.items()}
    return found | _vision_shapes(config)


def _vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    vision = config["vision_config"]
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    base = "visual.vision_model"
    found: dict[str, tuple[int, ...]] = {
        f"{base}.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{base}.embeddings.patch_embedding.bias": (width,),
        f"{base}.embeddings.position_embedding.weight": (
            (vision["image_size"] // patch) ** 2,
            width,
        ),
        f"{base}.embeddings.packing_position_embedding.weight": (7, width),
    }
    linears = {
        "mlp_AR.linear_1": (merged, merged),
        "mlp_AR.linear_2": (config["hidden_size"], merged),
    }
    norms = {"mlp_AR.pre_norm": merged, f"{base}.post_layernorm": width}
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{base}.encoder.layers.{layer}"
        norms |= {f"{prefix}.layer_norm{number}": width for number in (1, 2)}
        attention = [f"{prefix}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
        linears |= dict.fromkeys(attention, (width, width))
        linears |= {f"{prefix}.mlp.fc1": (inner, width), f"{prefix}.mlp.fc2": (width, inner)}
    found |= {f"{name}.weight": shape for name, shape in linears.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return found | {f"{n}.{part}": (w,) for n, w in norms.items() for part in ("weight", "bias")}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return random float32 weights, large enough that every part affects the result."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(config).items():
        drawn = generator.standard_normal(shape)
        is_norm = "norm" in name and name.endswith("weight")
        weights[name] = (1 + 0.2 * drawn if is_norm else 0.25 * drawn).astype(np.float32)
    return weights


def per_expert(weights: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Return the weights with one tensor per expert and projection, as in Qwen3."""
    split = {}
    for name, weight in weights.items():
        prefix, _, kind = name.rpartition(".experts.")
        if not prefix:
            split[name] = weight
            continue
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for number, expert in enumerate(weight):
            for part, half in zip(names, np.split(expert, len(names), axis=1), strict=True):
                split[f"{prefix}.experts.{number}.{part}.weight"] = half.T.copy()
    return split


def write_checkpoint(
    folder: Path, config: dict[str, Any], weights: dict[str, NDArray[np.float32]]
) -> Path:
    """Write config.json and two shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    files: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: torch.from_numpy(weights[n]) for n in part}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


CODE = """from transformers import PretrainedConfig

class KeyeVL2Config(PretrainedConfig):
    model_type = "KeyeVL2"
"""
TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNREAD_FIELDS = {
    "auto_map": {"AutoConfig": "configuration_keye_vl_2.KeyeVL2Config"},
    "eos_token_id": 89,
    "made_up": {"answer": [42]},
}
"""Fields of config.json that conversions do not read."""


def write_small_files(folder: Path) -> dict[str, str]:
    """Write what a released folder has beside weights, and return the content of each file.

    config.json, which must be there, gets UNREAD_FIELDS. The tokenizer knows single characters.
    """
    # Late, since it comes with transformers, which most tests here do without.
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | UNREAD_FIELDS))
    # In bytes, as the pre-tokenizer writes them.
    letters = sorted(set(string.ascii_letters + ".,?:0123456789") | {"\u0120", "\u010a"})
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")]
    )
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [89]}
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        ),
        "chat_template.jinja": TEMPLATE,
        "additional_chat_templates/plain.jinja": "{{ messages[0].content }}",
        "generation_config.json": json.dumps(generation),
        "preprocessor_config.json": json.dumps({"patch_size": PATCH}),
        "configuration_keye_vl_2.py": CODE,
        "LICENSE": "Apache-2.0",
        "README.md": "A model.",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return files
