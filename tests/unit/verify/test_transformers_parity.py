# SPDX-License-Identifier: Apache-2.0
"""Our decoder equals a random Qwen3MoeForCausalLM of transformers with the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from megatron_keye.checkpoint.hf.folder import open_hf
from megatron_keye.checkpoint.hf.weights import load_released
from megatron_keye.config import RolloutConfig
from megatron_keye.rollout.request import Completion, SamplingLaw
from megatron_keye.verify.one_process import OneProcessModel
from tests.support.dumping import Arrays, dump_folder, dump_transformers
from tests.support.hf_checkpoint import config_with, random_weights, write_checkpoint
from tests.support.ranks import run_on_ranks
from tests.support.rollout import build_engine, request, text_prompt
from tests.support.train import let_go

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


def test_greedy_answers_are_those_of_transformers(folder: Path, inputs: Arrays) -> None:
    prompts = [inputs["input_ids"][start : start + LENGTH // 2] for start in range(0, 20, 4)]
    (answers,) = run_on_ranks(1, _greedy, folder, prompts)
    # Untrained, the model may end an answer early by a placeholder of pictures.
    assert sum(len(answer.token_ids) for answer in answers) > 30
    for answer in answers:
        prompt, token_ids = prompts[answer.key], list(answer.token_ids)
        whole = {"input_ids": np.append(prompt, token_ids).astype(np.int64)}
        logits = torch.from_numpy(dump_transformers(folder, whole, "fp64")["logits"])
        before = logits[len(prompt) - 1 : -1]
        assert before.argmax(dim=-1).tolist() == token_ids
        expected = before.log_softmax(dim=-1)[range(len(token_ids)), token_ids]
        np.testing.assert_allclose(answer.log_probs, expected, rtol=0, atol=1e-10)


def _greedy(folder: Path, prompts: list[NDArray[np.int64]]) -> list[Completion]:
    opened = open_hf(folder)
    run = OneProcessModel(opened.model, torch.device("cpu"), "fp64").run
    run = replace(run, rollout=RolloutConfig(page_tokens=4, cache_tokens=300), device="cpu")
    engine, _, model = build_engine(run)
    stage, tower = model.stages[0].module, model.vision.module
    weights = {f"decoder.{name}": weight for name, weight in stage.named_parameters()}
    weights |= {f"vision.{name}": weight for name, weight in tower.named_parameters()}
    load_released(weights, opened)
    law = SamplingLaw(temperature=0.0)
    asked = [
        request(key, text_prompt(ids), max_new_tokens=LENGTH - len(ids), law=law)
        for key, ids in enumerate(prompts)
    ]
    answers = list(engine.generate(asked))
    let_go(model)
    return answers
