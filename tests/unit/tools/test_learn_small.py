# SPDX-License-Identifier: Apache-2.0
"""The chain goes from clips to rewards, stops its parts in time and says what it knows."""

import json
import sys
from pathlib import Path

import pytest

from tools import learn_small

FAKE = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
if words[0] == "forge_video":
    for part in ("train", "held_out"):
        lines = [
            {"id": f"{part}-{kind}", "kind": kind, "task": "grounding",
             "messages": [{"role": "user", "content": "When?"}],
             "truth": {"intervals": [[0, 5]], "seconds": 10.0}}
            for kind in ("when", "word")
        ]
        folder = pathlib.Path(words[1])
        folder.mkdir(exist_ok=True)
        (folder / f"{part}.questions.jsonl").write_text("\\n".join(map(json.dumps, lines)) + "\\n")
    sys.exit()
settings = dict(word.split("=", 1) for word in words if "=" in word)
run = pathlib.Path(settings["output_dir"]) / words[1]
(run / "evaluations").mkdir(parents=True)
word = 0.75 if "training.checkpoint.weights" in settings else 0.25
scores = [{"id": "held_out-when", "score": 0.9}, {"id": "held_out-word", "score": word}]
(run / "evaluations" / "step-00000100.jsonl").write_text(
    "".join(json.dumps(line) + "\\n" for line in scores)
)
policy = {"reward_task": 0.5, "num_groups_dropped": 1, "num_prompts": 4}
names = ("step", "data_wait", "decoder", "vision", "vision_wait")
seconds = {f"{name}_seconds": 0.25 for name in names}
lines = [{"step": 1, "loss": 2.0, **seconds}, {"step": 50, "policy": policy}]
lines += [{"step": 100, "evaluation": {}}]
start = {"versions": {"torch": "2", "python": "3"}, "command": "x train", "device": "CPU",
         "commit": "0123456789"}
(run / "environment.json").write_text(json.dumps([start]))
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
print(settings.get("training.checkpoint.weights", "none"), flush=True)
sys.exit(FAILS) if FAILS else None
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
time.sleep(60)
"""


def lines_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "progress.jsonl").open()]


def chain(
    out: Path, monkeypatch: pytest.MonkeyPatch, *, fails: int = 0
) -> tuple[int, list[dict[str, object]]]:
    """Run the chain with a program that trains nothing until it is told to stop."""
    program = out.with_name("fake.py")
    program.write_text(FAKE.replace("FAILS", str(fails)))
    monkeypatch.setattr(learn_small, "_PROGRAM", [sys.executable, str(program)])
    monkeypatch.setattr(learn_small, "_POLL_SECONDS", 0.05)
    status = learn_small.main([str(out), "--supervised-until", "1", "--until", "2"])
    return status, lines_of(out)


def test_parts_stop_in_time_and_rewards_start_from_what_was_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    status, lines = chain(out, monkeypatch)
    assert status == 0
    parts = [line["part"] for line in lines]
    trainings = [name for name in ("keye_small", "keye_small_rl") for _ in range(3)]
    assert parts == ["begin", "forge_video", "blind", *trainings, "result"]
    assert lines[2]["whole"] == {"when": 0.5, "word": 0.5}
    assert lines[2]["constant"] == {"when": 1.0, "word": 1.0}
    reward, scores, end = lines[3:6]
    assert (reward["reward"], reward["teaching"], reward["step"]) == (0.5, 0.75, 50)
    assert scores["mIoU"] == {"when": 0.9, "word": 0.25}
    assert scores["step_seconds"] == scores["vision_wait_seconds"] == 0.25
    assert end["was_told_to_stop"] and 1 <= float(str(end["seconds"])) < 2
    weights = (out / "keye_small_rl.log").read_text().strip()
    assert weights == str(out / "keye_small" / "checkpoints" / "step-00000100")
    recorded = [json.loads(line) for line in (out / "lines.jsonl").open()]
    assert [(line["run"], line["word mIoU"]) for line in recorded] == [
        ("keye_small", 0.25),
        ("keye_small_rl", 0.75),
    ]
    assert (out / "curves.svg").read_text().count("word mIoU") == 1
    assert (lines[-1]["before"], lines[-1]["after"], lines[-1]["lift"]) == (0.25, 0.75, 0.5)


def test_a_part_that_fails_ends_the_chain_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = chain(tmp_path / "out", monkeypatch, fails=3)
    assert status == 2 and lines[-1]["status"] == 3
    assert "keye_small: ended with status 3" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipes_go_from_clips_to_rewards(tmp_path: Path) -> None:
    shown = "--seconds 6 7 --rate 1 --plain --variable 0 --words 1 --blinking 0 --size 56 56"
    asked = "--shapes 1 --stay 2 --questions when at describe word --unanswered word --tokenizer"
    settings = [
        *("device=cpu", "training.precision=fp32", "training.steps=1", "training.rows_per_step=1"),
        *("model.decoder.num_layers=1", "model.decoder.experts.num_experts=2"),
        *("model.decoder.hidden_size=64", "model.decoder.experts.intermediate_size=64"),
        *("model.vision.num_layers=1", "model.vision.hidden_size=48"),
        *("data.frames.min_tokens_per_frame=1", "data.frames.max_tokens_per_frame=4"),
        *("data.row_tokens=256", "model.decoder.indexer.top_k=16"),
    ]
    rewarded = ["prompts_per_step=2", "answers_per_prompt=2", "drops_equal_groups=false"]
    words = [str(tmp_path / "out"), "--samples", "6", "--held-out", "2"]
    words += ["--clips", f"{shown} {asked} --workers 1"]
    words += [word for each in settings for word in ("--set", each)]
    words += [word for each in rewarded for word in ("--set-rewarded", f"post_training.{each}")]
    assert learn_small.main(words) == 0
    lines = lines_of(tmp_path / "out")
    assert [line["part"] for line in lines if "reward" in line] == ["keye_small_rl"]
    assert lines[-1]["kind"] == "word" and (tmp_path / "out" / "curves.svg").is_file()
    assert len((tmp_path / "out" / "lines.jsonl").read_text().splitlines()) == 2
