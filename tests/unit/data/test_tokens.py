# SPDX-License-Identifier: Apache-2.0
"""The packaged vocabulary behaves as Qwen3's own tokenizer does."""

import json
from pathlib import Path

import pytest

from megatron_keye.data.tokens import load_tokenizer

QWEN3_IDS = {
    "<|endoftext|>": 151_643,
    "<|im_start|>": 151_644,
    "<|im_end|>": 151_645,
    "<|vision_start|>": 151_652,
    "<|vision_end|>": 151_653,
    "<|image_pad|>": 151_655,
    "<|video_pad|>": 151_656,
}
TEXTS = [
    "",
    "Hello, world! It's 2026.",
    "<1.5 seconds>",
    "  two  spaces\n\n\ttab\r\n",
    "\u5feb\u624b Keye \u89c6\u9891",
    "emoji \U0001f407 and a flag \U0001f1e8\U0001f1ed",
]


def test_control_tokens_have_the_ids_of_qwen3() -> None:
    tokenizer = load_tokenizer("qwen")
    for name, token in QWEN3_IDS.items():
        assert tokenizer.control_id(name) == token
        assert tokenizer.decode([token]) == name
    assert tokenizer.vocab_size == 151_669
    assert tokenizer.decode([151_667, 151_668]) == "<think></think>"


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_inverts_encoding(text: str) -> None:
    tokenizer = load_tokenizer("qwen")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_ids_of_a_known_text() -> None:
    # From Qwen2's and Qwen3's published tokenizer.
    assert load_tokenizer("qwen").encode("Hello, world!") == [9707, 11, 1879, 0]


def test_digits_are_tokens_of_their_own() -> None:
    assert len(load_tokenizer("qwen").encode("184320")) == 6


@pytest.mark.parametrize("name", sorted(QWEN3_IDS))
def test_control_tokens_in_text_stay_text(name: str) -> None:
    tokenizer = load_tokenizer("qwen")
    token_ids = tokenizer.encode(f"a {name} b")
    assert max(token_ids) < 151_643
    assert tokenizer.decode(token_ids) == f"a {name} b"


def test_thinking_marks_are_single_tokens_as_in_qwen3() -> None:
    assert load_tokenizer("qwen").encode("<think>")[0] == 151_667


def test_composed_and_decomposed_accents_are_the_same() -> None:
    tokenizer = load_tokenizer("qwen")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.tokenizer: got 'no/such/folder'"):
        load_tokenizer("no/such/folder")
    with pytest.raises(ValueError, match="no tokenizer that transformers can read"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="has no token <|no_such|>"):
        load_tokenizer("qwen").control_id("<|no_such|>")


def test_a_folder_gives_its_own_tokenizer(tmp_path: Path) -> None:
    vocabulary = {letter: place for place, letter in enumerate("ab<|im_end>")}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 11, "content": "<|im_end|>", "special": True, **special}],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.control_id("<|im_end|>") == 11
    assert 11 not in loaded.encode("a<|im_end|>b"), "user text closed a turn"
    assert loaded.encode("ab") == [0, 1]
    assert loaded.decode([0, 11]).replace(" ", "") == "a<|im_end|>"
    assert loaded.vocab_size == 12
