# SPDX-License-Identifier: Apache-2.0
"""The needle task asks what its texts and videos hold, and its questions know what is right."""

import json
from pathlib import Path

from megatron_keye.scoring.question_file import read_questions
from tools import needle_task

NUM_HELD_OUT = 64


def test_each_text_holds_what_its_answer_repeats(tmp_path: Path) -> None:
    assert needle_task.main([str(tmp_path), "--samples", "1"]) == 0
    lines = (tmp_path / "text.held_out.jsonl").read_text().splitlines()
    assert len(lines) == NUM_HELD_OUT
    for line in lines:
        user, assistant = (turn["content"] for turn in json.loads(line)["messages"])
        text, _, asked = user.partition(" ask ")
        answer = assistant.split()
        assert answer[::2] == asked.split()
        pairs = {f"{key}={value}" for key, value in zip(answer[::2], answer[1::2], strict=True)}
        assert pairs and pairs <= set(text.split())
    for kind in ("text", "frames"):
        questions = read_questions(tmp_path / f"{kind}.questions.jsonl")
        answers = [
            json.loads(line)["messages"][-1]["content"]
            for line in (tmp_path / f"{kind}.held_out.jsonl").read_text().splitlines()
        ]
        assert len(questions) == NUM_HELD_OUT
        for question, answer in zip(questions, answers, strict=True):
            assert question.truth.score(answer, None).value == 1
            assert question.truth.score(answer.rpartition(" ")[0], None).value == 0


def test_the_stages_differ_in_what_learns_and_share_the_rest() -> None:
    stages = needle_task.dense, needle_task.warmup, needle_task.sparse
    runs = [stage(num_ranks=1, has_gpu=False) for stage in stages]
    assert [run.training.phase for run in runs] == ["dense", "indexer_warmup", "sparse"]
    assert len({run.name for run in runs}) == 3
    assert all(run.model == runs[0].model and run.data == runs[0].data for run in runs)
