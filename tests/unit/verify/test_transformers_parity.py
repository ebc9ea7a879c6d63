"""Our decoder equals a random Qwen3MoeForCausalLM of transformers with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.dumping import Arrays, dump_folder, dump_transformers
from tests.support.hf_checkpoint import config_with, random_weights, write_checkpoint

transformers = pytest.importorskip("transformers", reason="the reference is transformers")

LENGTH = 40
CONFIG = config_with(top_k=LENGTH)


@pytest.fixture(scope="module")
def reference() -> Any:
    """Return a random model in float32."""
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    fields += ("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok")
    fields += ("moe_intermediate_size", "norm_topk_prob", "rms_norm_eps", "tie_word_embeddings")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **{name: CONFIG[name] for name in fields},
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG["rope_theta"]},
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Path:
    """Return a Keye-VL folder with the decoder that transformers saved, experts apart."""
    saved = tmp_path_factory.mktemp("qwen3-moe")
    reference.save_pretrained(saved)
    decoder = {n: w.numpy() for n, w in load_file(saved / "model.safetensors").items()}
    others = ("visual.", "mlp_AR.", "sa_indexer.")
    drawn = {n: w for n, w in random_weights(CONFIG).items() if any(o in n for o in others)}
    return write_checkpoint(tmp_path_factory.mktemp("keye"), CONFIG, decoder | drawn)


@pytest.fixture(scope="module")
def inputs() -> Arrays:
    return {"input_ids": np.random.default_rng(0).integers(0, 90, LENGTH)}


def test_float32_logits_equal_those_of_transformers(
    folder: Path, reference: Any, inputs: Arrays
) -> None:
    with torch.no_grad():
        expected = reference(torch.from_numpy(inputs["input_ids"])[None]).logits[0].numpy()
    ours = dump_folder(folder, inputs, "fp32")
    assert np.abs(expected).max() > 1, "logits are not all small"
    np.testing.assert_allclose(ours["logits"], expected, rtol=0, atol=1e-5)


def test_float64_agrees_with_transformers_in_every_layer(folder: Path, inputs: Arrays) -> None:
    theirs = dump_transformers(folder, inputs, "fp64")
    ours = dump_folder(folder, inputs)
    assert theirs["logits"].dtype == theirs["hidden"].dtype == np.float64, "float64 throughout"
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-10, err_msg=name)


def test_with_fewer_keys_than_tokens_the_two_differ(folder: Path, inputs: Arrays) -> None:
    """Guards the tests above: the comparison sees what sparse attention leaves out."""
    few = folder.parent / "few"
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= {name: weight.numpy() for name, weight in load_file(path).items()}
    write_checkpoint(few, config_with(top_k=LENGTH // 2), weights)
    apart = np.abs(dump_folder(few, inputs)["logits"] - dump_folder(folder, inputs)["logits"])
    # Not 0: later tokens go to other experts, which then multiply batches of another size.
    assert apart[: LENGTH // 2].max() < 1e-12, "these queries select all keys"
    assert apart[LENGTH // 2 :].max() > 1e-3
