# SPDX-License-Identifier: Apache-2.0
"""A prompt is a sample up to its last answer, token by token and picture by picture."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data.conversation import parse_conversation
from megatron_keye.data.prompts import PromptFile, without_answer
from megatron_keye.data.row import IGNORED_LABEL, Sample
from megatron_keye.data.sample import make_prompt, make_sample
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.data.video.probe import probe
from megatron_keye.errors import UserError
from tests.support.clips import BIG_BUCK_BUNNY, tiny_model

FRAMES = FrameConfig(min_tokens_per_frame=1, max_tokens_per_frame=3)
CONFIG = DataConfig(samples="none", row_tokens=4096, frames=FRAMES)
QWEN3 = replace(CONFIG, thinking="qwen3", trains_on_shortened_turns=True)
TOKENIZER, MODEL = load_tokenizer("qwen"), tiny_model()

VIDEO = {"type": "video", "video": BIG_BUCK_BUNNY, "end": 1.0}
THOUGHT = {"role": "assistant", "content": "A", "reasoning_content": "hm"}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    "a video": [
        {"role": "user", "content": [VIDEO, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "A"},
    ],
    "several turns": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        THOUGHT,
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ],
}


def both(messages: list[dict[str, Any]], config: DataConfig, **more: Any) -> tuple[Sample, Sample]:
    """Return the sample of a conversation and the prompt of its last answer."""
    conversation = parse_conversation({"messages": messages}, "file:1", Path())
    asked, expected = without_answer(conversation)
    assert expected == "A"
    return (
        make_sample(conversation, TOKENIZER, config, MODEL),
        make_prompt(asked, TOKENIZER, config, MODEL, **more),
    )


@pytest.mark.parametrize("messages", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("config", [CONFIG, QWEN3], ids=["keep", "qwen3"])
def test_a_prompt_is_where_its_sample_begins(
    messages: list[dict[str, Any]], config: DataConfig
) -> None:
    sample, prompt = both(messages, config, skips_thinking=config is QWEN3)
    length = len(prompt.token_ids)
    np.testing.assert_array_equal(prompt.token_ids, sample.token_ids[:length])
    assert TOKENIZER.decode(sample.token_ids[length:].tolist()) == "A<|im_end|>\n"
    assert prompt.pictures == sample.pictures
    assert prompt.picture_starts == sample.picture_starts
    assert (prompt.labels == IGNORED_LABEL).all() and not prompt.weights.any()


def test_nobody_answers_the_assistant() -> None:
    conversation = parse_conversation({"messages": RECORDS["a question"]}, "file:1", Path())
    with pytest.raises(UserError, match="file:1: ends with the assistant's turn"):
        make_prompt(conversation, TOKENIZER, CONFIG, MODEL)


def test_questions_come_from_samples_with_and_without_an_answer(tmp_path: Path) -> None:
    asked = [RECORDS["a question"], RECORDS["a question"][:1]]
    lines = [json.dumps({"messages": messages}) for messages in asked]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines))
    questions = PromptFile(
        str(file), TOKENIZER, CONFIG, MODEL, skips_thinking=False, probe_video=probe
    )
    first, second = (questions.read(index) for index in range(len(questions)))
    assert (first.expected, second.expected) == ("A", None)
    np.testing.assert_array_equal(first.prompt.token_ids, second.prompt.token_ids)
    assert second.prompt.name == f"{file}:2"
