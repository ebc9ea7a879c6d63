# SPDX-License-Identifier: Apache-2.0
"""The tiny recipe as a user starts it: it learns, stops, resumes, and says what is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.clips import make_clip

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("training.steps=4", "training.rows_per_step=1", "device=cpu")
RANK_SECONDS = 240


def launch(
    folder: Path, *arguments: str, recipe: str = "keye_tiny", ranks: int = 4
) -> subprocess.CompletedProcess[str]:
    """Run launch/local.sh with settings, results in `folder`."""
    settings = [part for setting in arguments for part in ("--set", setting)]
    return subprocess.run(
        ["bash", str(ROOT / "launch/local.sh"), "--ranks", str(ranks), recipe]
        + ["--set", f"output_dir={folder}", *settings],
        # With a toolkit and without a GPU, torch has something to warn of on each rank.
        env=os.environ | {"PYTHON": sys.executable, "CUDA_HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=RANK_SECONDS,
        check=False,
    )


def losses(folder: Path) -> list[float]:
    events = EventAccumulator(str(folder / "keye_tiny" / "events"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    result = launch(folder, *SMALL)
    assert result.returncode == 0, result.stderr
    said = r"(INFO:[\w.]+:(decoding video with pyav .*|\w+ runs as \w+)\n)+"
    assert re.fullmatch(said, result.stderr)
    return folder


def test_it_trains_on_a_real_video_across_vision_and_decoder_ranks(unbroken: Path) -> None:
    summary = json.loads((unbroken / "keye_tiny" / "summary.json").read_text())
    assert summary["last_loss"] < summary["first_loss"] - 0.2
    assert summary["ranks"] == {"decoder": 2, "vision": 2}
    assert summary["steps"] == 4
    assert summary["pictures"] > 0 and summary["tokens"] > 0
    assert "video" not in summary, "it would grow with the data"
    assert (Path(summary["checkpoint"]) / "metadata.json").is_file()
    assert (unbroken / "keye_tiny" / "run.json").is_file()
    assert len(losses(unbroken)) == 4
    (start,) = json.loads((unbroken / "keye_tiny" / "environment.json").read_text())
    assert sum(start["hosts"].values()) == 4 and "keye_tiny" in start["command"]


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_unbroken(unbroken: Path, tmp_path: Path) -> None:
    first = launch(tmp_path, *SMALL, "training.stop_after_step=2")
    assert first.returncode == 0, first.stderr
    exports = "training.checkpoint.export_every=1"
    second = launch(tmp_path, *SMALL, "training.checkpoint.resume=auto", exports)
    assert second.returncode == 0, second.stderr
    exported = tmp_path / "keye_tiny" / "exports" / "step-00000004"
    assert (exported / "config.json").is_file(), second.stderr
    assert f"{exported} will lack, for serving" in second.stderr
    assert losses(tmp_path) == losses(unbroken)
    lines = (tmp_path / "keye_tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    summaries = [
        json.loads((folder / "keye_tiny" / "summary.json").read_text())
        for folder in (tmp_path, unbroken)
    ]
    assert summaries[0]["tokens"] == summaries[1]["tokens"], "those of both starts"
    # On another grid, since it only has to find that nothing is left to do.
    third = launch(tmp_path, *SMALL, "training.checkpoint.resume=auto", ranks=1)
    assert third.returncode == 0, third.stderr
    assert "step 4 is done" in third.stdout


@pytest.mark.slow
def test_a_run_with_frozen_vision_resumes_what_it_worked_ahead(tmp_path: Path) -> None:
    frozen = (*SMALL, "training.frozen=vision,projector")
    for folder, more in (("whole", ()), ("parts", ("training.stop_after_step=2",))):
        (tmp_path / folder).mkdir()
        result = launch(tmp_path / folder, *frozen, *more, ranks=2)
        assert result.returncode == 0, result.stderr
    result = launch(tmp_path / "parts", *frozen, "training.checkpoint.resume=auto", ranks=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


USER_ERRORS = {
    "unknown recipe": ({"recipe": "keye_tini", "ranks": 2}, (), "did you mean keye_tiny"),
    "unknown field": ({"ranks": 2}, ("training.stepz=3",), "did you mean steps"),
    "degrees that do not fit": ({"ranks": 2}, ("parallel.decoder.tensor=2",), "2, the number of"),
    "missing samples": ({"ranks": 1}, ("data.samples=nowhere.jsonl",), "nowhere.jsonl"),
    "missing video": ({"ranks": 2}, ("data.samples={folder}/missing.jsonl",), "missing.mp4"),
    "video that fails on its vision rank": (
        {"ranks": 2},
        ("data.samples={folder}/hollow.jsonl", "data.row_tokens=600"),
        "hollow.mp4",
    ),
    "no step that can be applied": (
        {"ranks": 2},
        ("training.steps=2", "training.indexer_loss_weight=1e300"),
        "no step changed a weight",
    ),
    "unreadable video": ({"ranks": 1}, ("data.samples={folder}/broken.jsonl",), "broken.mp4"),
}


@pytest.mark.parametrize(("how", "settings", "says"), USER_ERRORS.values(), ids=USER_ERRORS)
def test_a_user_error_is_one_sentence_and_ends_all_ranks(
    how: dict[str, object], settings: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    _make_hollow(tmp_path / "hollow.mp4")
    for name in ("missing", "broken", "hollow"):
        (tmp_path / f"{name}.jsonl").write_text(_conversation_about(f"{name}.mp4"))
    given = [setting.format(folder=tmp_path) for setting in settings]
    result = launch(tmp_path, *given, "device=cpu", **how)  # type: ignore[arg-type]
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr


@pytest.mark.slow
def test_a_video_that_does_not_decode_is_skipped_where_the_run_says_so(tmp_path: Path) -> None:
    _make_hollow(tmp_path / "hollow.mp4")
    make_clip(tmp_path / "good.mp4")
    lines = "".join(map(_conversation_about, ("hollow.mp4", "good.mp4")))
    (tmp_path / "mixed.jsonl").write_text(lines)
    settings = ("data.on_bad_sample=skip", f"data.samples={tmp_path}/mixed.jsonl")
    steps = ("training.steps=2", "training.rows_per_step=1", "data.row_tokens=1200", "device=cpu")
    result = launch(tmp_path, *settings, *steps, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "sample skipped" in result.stderr and "hollow.mp4" in result.stderr
    summary = json.loads((tmp_path / "keye_tiny" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["skipped_samples"] >= 2
    assert 0 < summary["last_loss"] < summary["first_loss"] + 1
    events = EventAccumulator(str(tmp_path / "keye_tiny" / "events"))
    events.Reload()
    counts = [event.value for event in events.Scalars("data/skipped_samples")]
    assert counts[-1] == summary["skipped_samples"]


def _make_hollow(path: Path) -> None:
    """Write a video whose times can be read and whose pictures cannot."""
    make_clip(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    end = start + int.from_bytes(data[start - 8 : start - 4]) - 8
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def _conversation_about(video: str) -> str:
    question = [{"type": "video", "video": video}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A film."}]
    return json.dumps({"messages": turns}) + "\n"
