# SPDX-License-Identifier: Apache-2.0
"""Runs a checkpoint's language model with transformers, as an independent reference.

Where top-k covers all keys, sparse attention is dense, and the decoder is a Qwen3-MoE.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_keye.checkpoint.hf.folder import HfFolder
from megatron_keye.config import ModelConfig
from megatron_keye.errors import UserError
from megatron_keye.verify.dump import Arrays
from megatron_keye.verify.dump_inputs import DumpInputs
from megatron_keye.verify.one_process import OneProcessModel


class _KeepFloat64(TorchFunctionMode):
    """Turns casts to float32 into float64; transformers has them in norms, rotary and softmax."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        changed = {n: _widen(value) for n, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **changed)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@torch.no_grad()
def run_qwen3_moe(folder: HfFolder, model: OneProcessModel, inputs: DumpInputs) -> Arrays:
    """Return `logits` [T, V] and `hidden` [layers, T, D] of transformers' Qwen3MoeForCausalLM.

    Args:
        folder: Source of the decoder's weights, read without our own loader.
        model: Gives sizes, type and device.
        inputs: One document of text, of at most top-k tokens.

    Raises:
        UserError: When the inputs are not such text, or transformers is not installed.
    """
    check_text(inputs, model.run.model)
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise UserError(
            "--against qwen3-moe: got no installed transformers, expected version 5 or later; "
            'install it with pip install "megatron-keye[hf]"'
        ) from error
    # Built outside _KeepFloat64: its constructor needs float32 in places.
    config = transformers.Qwen3MoeConfig(**_config(model.run.model))
    reference = transformers.Qwen3MoeForCausalLM(config).to(model.dtype).to(model.device).eval()
    for name, weight in reference.named_parameters():
        weight.copy_(_read(folder, name))
    hidden: list[Tensor] = []
    for layer in reference.model.layers:
        layer.register_forward_hook(lambda _, __, output: hidden.append(output))
    token_ids = inputs.token_ids[None].to(model.device)
    if model.dtype == torch.float64:
        reference.model.rotary_emb.inv_freq = _exact_frequencies(model)
        with _KeepFloat64():
            logits = reference(token_ids, use_cache=False).logits
    else:
        logits = reference(token_ids, use_cache=False).logits
    return {"logits": logits[0].cpu().numpy(), "hidden": torch.cat(hidden).cpu().numpy()}


def check_text(inputs: DumpInputs, model: ModelConfig) -> None:
    """Raise a UserError unless the inputs are one document of text of at most top-k tokens."""
    top_k = model.decoder.indexer.top_k
    length, num_documents = len(inputs.token_ids), len(inputs.document_bounds) - 1
    num_pictures = len(inputs.images.patch_grids) + len(inputs.videos.patch_grids)
    if length > top_k or num_documents > 1 or num_pictures > 0:
        raise UserError(
            f"--against qwen3-moe: got {length} tokens in {num_documents} documents with "
            f"{num_pictures} pictures, expected one document of text of at most topk = {top_k} "
            "tokens; leave --inputs out, or shorten it"
        )


def _config(model: ModelConfig) -> dict[str, Any]:
    decoder = model.decoder
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "num_experts": decoder.experts.num_experts,
        "num_experts_per_tok": decoder.experts.num_experts_per_token,
        "moe_intermediate_size": decoder.experts.intermediate_size,
        "norm_topk_prob": True,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }


def _read(folder: HfFolder, name: str) -> Tensor:
    """Return a weight of transformers' model, which holds experts as one [E, out, in]."""
    prefix, _, kind = name.rpartition(".experts.")
    if not prefix:
        return folder.read(name)
    if name in folder.entries:
        return folder.read(name).transpose(1, 2)
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    experts: list[Tensor] = []
    while f"{prefix}.experts.{len(experts)}.down_proj.weight" in folder.entries:
        own = f"{prefix}.experts.{len(experts)}"
        experts.append(torch.cat([folder.read(f"{own}.{part}.weight") for part in parts]))
    return torch.stack(experts)


def _exact_frequencies(model: OneProcessModel) -> Tensor:
    decoder = model.run.model.decoder
    exponents = torch.arange(0, decoder.head_dim, 2, device=model.device, dtype=torch.float64)
    return 1 / decoder.rope_theta ** (exponents / decoder.head_dim)
