# SPDX-License-Identifier: Apache-2.0
"""keye_small has 100 million weights, and what it trains on lacks the kind that is held out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_keye.cli import forge_video
from megatron_keye.data.row import IGNORED_LABEL
from megatron_keye.data.source import ConversationFile
from megatron_keye.data.tokens import END_OF_TEXT, load_tokenizer
from megatron_keye.estimate.parameters import decoder_parameters, vision_parameters
from megatron_keye.kernels.lightning_indexer import cuda as indexer
from megatron_keye.kernels.sparse_attention import cuda as attention
from megatron_keye.recipes import keye_small as recipe
from megatron_keye.recipes.keye_small_rl import keye_small_rl
from tools import learn_small
from tools.learn_small_scores import TAUGHT_KIND, choose_questions

RUN = recipe.keye_small(num_ranks=1, has_gpu=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return few clips as the recipe's command forges them."""
    out = tmp_path_factory.mktemp("small") / "clips"
    words = [str(out), "--samples", "6", "--held-out", "6", *learn_small.CLIPS.split()]
    assert forge_video.main([*words, "--workers", "1"]) == 0
    return out


def test_it_has_about_100_million_weights() -> None:
    held = [*decoder_parameters(RUN, 0), *vision_parameters(RUN)]
    assert 90e6 < sum(part.count for part in held) < 110e6


def test_its_sizes_are_those_of_the_cuda_operators() -> None:
    decoder = RUN.model.decoder
    assert decoder.head_dim in attention.CHANNELS
    assert decoder.num_heads // decoder.num_kv_heads in attention.HEADS
    assert decoder.indexer.head_dim == indexer.CHANNELS
    assert decoder.indexer.num_heads <= indexer.MAX_HEADS
    assert 8 * decoder.indexer.top_k <= RUN.data.row_tokens


def test_its_docstring_has_the_command_that_forges_its_clips() -> None:
    text = " ".join((recipe.__doc__ or "").replace("\\\n", " ").split())
    assert f"{recipe.FOLDER} --samples 16000 --held-out 128 {learn_small.CLIPS}" in text


def test_it_reads_what_the_command_forges(folder: Path) -> None:
    data = replace(
        RUN.data, samples=str(folder / "train.jsonl"), tokenizer=str(folder / "tokenizer")
    )
    tokenizer = load_tokenizer(data.tokenizer)
    assert tokenizer.vocab_size <= RUN.model.decoder.vocab_size
    source = ConversationFile(folder / "train.jsonl", tokenizer, data, RUN.model)
    assert not source.unread
    for sample in source.load(range(source.num_samples)):
        assert tokenizer.control_id(END_OF_TEXT) not in sample.token_ids, "no word is unknown"
        num_vision = int((sample.token_ids == RUN.model.video_token_id).sum())
        assert num_vision == 16 * len(sample.pictures)
        assert 1.5 * RUN.model.decoder.indexer.top_k <= num_vision < RUN.data.row_tokens // 6
        assert (sample.labels != IGNORED_LABEL).sum() > 40


def test_the_kind_that_is_held_out_is_in_no_conversation(folder: Path) -> None:
    kinds = choose_questions(folder)
    assert set(kinds.values()) == {TAUGHT_KIND, recipe.HELD_OUT_KIND}
    rewarded = keye_small_rl(num_ranks=1, has_gpu=True)
    named = Path(rewarded.data.samples)
    assert named.parent == Path(recipe.FOLDER)
    lines = [json.loads(line) for line in (folder / named.name).open()]
    asked = {line["messages"][0]["content"][1]["text"] for line in lines}
    assert len(lines) == 6 and all(text.startswith("When is the word") for text in asked)
    for part in ("train", "held_out"):
        text = (folder / f"{part}.jsonl").read_text()
        assert "When is the" in text and not any(each in text for each in asked)
        assert "shown?" not in text
