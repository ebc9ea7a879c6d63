# SPDX-License-Identifier: Apache-2.0
"""What the recipe's own command forges is what the recipe reads."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

from megatron_keye.cli import forge_video
from megatron_keye.data.row import IGNORED_LABEL
from megatron_keye.data.source import ConversationFile
from megatron_keye.data.tokens import END_OF_TEXT, load_tokenizer
from megatron_keye.recipes import keye_tiny_grounding as recipe
from megatron_keye.scoring.parse_intervals import parse_intervals
from megatron_keye.scoring.question_file import read_questions
from megatron_keye.scoring.summary import score_questions, summarize


def forge_command() -> list[str]:
    """Return the arguments of the docstring's first command, behind the folder."""
    text = (recipe.__doc__ or "").replace("\\\n", " ")
    [line] = [line for line in text.splitlines() if "megatron-keye forge_video" in line]
    return shlex.split(line)[3:]


def test_the_recipe_reads_what_its_command_forges(tmp_path: Path) -> None:
    words = forge_command()
    words[words.index("--samples") + 1] = "8"
    folder = tmp_path / "out"
    assert forge_video.main([str(folder), *words, "--held-out", "40", "--workers", "1"]) == 0
    run = recipe.keye_tiny_grounding(num_ranks=1, has_gpu=False)
    data = replace(
        run.data, samples=str(folder / "train.jsonl"), tokenizer=str(folder / "tokenizer")
    )
    tokenizer = load_tokenizer(data.tokenizer)
    assert tokenizer.vocab_size <= run.model.decoder.vocab_size
    source = ConversationFile(folder / "train.jsonl", tokenizer, data, run.model)
    assert not source.unread
    for sample in source.load(range(source.num_samples)):
        assert tokenizer.control_id(END_OF_TEXT) not in sample.token_ids, "no word is unknown"
        assert len(sample.token_ids) < run.model.decoder.indexer.top_k
        assert len(sample.token_ids) <= run.data.row_tokens
        frames = [f"<{picture.seconds:.1f} seconds>" for picture in sample.pictures]
        text = tokenizer.decode(sample.token_ids.tolist())
        assert all(frame in text for frame in frames)
        answers = tokenizer.decode([int(each) for each in sample.labels if each != IGNORED_LABEL])
        assert all(len(tokenizer.encode(frame)) == 1 for frame in frames), "a time is one token"
        for answer in answers.split("<|im_end|>")[:-1]:
            assert parse_intervals(answer) or re.match(r" ?<[0-9.]+ seconds> [a-z]", answer)
    questions = read_questions(folder / "held_out.questions.jsonl")
    asked = [question for question in questions if question.task == run.training.evaluation.task]
    blind = summarize(score_questions(asked, {}))[0].blind
    assert blind is not None and blind < 0.2, "the whole video is no good answer"
