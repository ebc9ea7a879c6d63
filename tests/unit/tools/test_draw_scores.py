# SPDX-License-Identifier: Apache-2.0
"""The picture of a run's scores shows what metrics.jsonl has."""

import json
from pathlib import Path

import pytest

from tools import draw_scores


def test_the_picture_has_the_loss_and_each_score(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 2, "evaluation": {"grounding": {"mIoU": 0.25}}},
        {"step": 4, "evaluation": {"grounding": {"mIoU": 0.75}}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    curves = draw_scores.read_curves(map(json.loads, text.splitlines()))
    assert curves == {"loss": [(1, 2.0)], "grounding mIoU": [(2, 0.25), (4, 0.75)]}
    (tmp_path / "metrics.jsonl").write_text(text)
    out = tmp_path / "scores.svg"
    assert draw_scores.main([str(tmp_path), "--out", str(out)]) == 0
    assert "grounding mIoU" in out.read_text() and "0.75" in out.read_text()


def test_a_run_that_learns_from_answers_shows_which_prompts_teach() -> None:
    policy = {"reward_task": 0.5, "num_groups_dropped": 3.0, "num_prompts": 12.0}
    curves = draw_scores.read_curves([{"step": 1, "policy": policy}])
    assert curves == {"reward": [(1, 0.5)], "share of prompts that teach": [(1, 0.75)]}


def test_a_run_without_scores_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw_scores.main([str(tmp_path), "--out", str(tmp_path / "a.svg")]) == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert draw_scores.main([str(tmp_path), "--out", str(tmp_path / "a.svg")]) == 2
    assert "expected those of training.evaluation.samples" in capsys.readouterr().err
    assert not (tmp_path / "a.svg").exists()
