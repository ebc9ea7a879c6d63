# SPDX-License-Identifier: Apache-2.0
"""The command makes a store, prints its totals, refuses bad samples, and continues if killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_keye.cli import prepare
from megatron_keye.data.loader import RowLoader
from megatron_keye.recipes import load_recipe
from tests.support.clips import make_clip

RECIPE = ["--recipe", "keye_tiny", "--workers", "1"]


def line(question: str, **media: Any) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
    return json.dumps({"messages": turns} | media)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    make_clip(tmp_path / "v.mp4", 60)
    path = tmp_path / "s.jsonl"
    lines = [line("<video>What?", videos=["v.mp4"]), line("Why?"), line("Caf\u00e9?")]
    path.write_text("\n".join(lines))
    return path


def test_the_command_line_makes_a_store_that_trains(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = samples.parent / "out"
    arguments = [str(samples), "--out", str(out), *RECIPE, "--set", "data.row_tokens=32"]
    assert prepare.main([*arguments, "--preview", "2"]) == 0
    shown = capsys.readouterr().out
    for words in ("samples", "tokens", "video", "left out", "longer than data.row_tokens = 32"):
        assert words in shown
    run = load_recipe("keye_tiny")(num_ranks=1, has_gpu=True)
    rows = [
        RowLoader(run.with_overrides([f"data.samples={path}"]).data, run.model, 0).next_rows(3)
        for path in (samples, out)
    ]
    assert [row.sample_names for row in rows[0]] == [row.sample_names for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    with Image.open(out.with_name("out.preview.png")) as sheet:
        assert np.asarray(sheet).std() > 10, "an empty sheet"
    text = out.with_name("out.preview.txt").read_text()
    assert "<0.5 seconds><|vision_start|><|video_pad|>x" in text
    assert "Caf\u00e9?<|im_end|>" in text and f"{samples}:3: " in text


def test_bad_samples_are_sentences(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with samples.open("a") as stream:
        stream.writelines(f"\n{line('<image>', images=[f'gone-{n}.png'])}" for n in range(25))
    out = samples.parent / "out"
    assert prepare.main([str(samples), "--out", str(out), *RECIPE]) == 2
    errors = capsys.readouterr().err
    assert "25 of 28 samples are unusable" in errors and "--on-bad-sample skip" in errors
    assert f"{samples}:4: gone-0.png: " in errors and "... and 5 more" in errors
    assert not out.exists()
    arguments = [str(samples), "--out", str(out), *RECIPE, "--on-bad-sample", "skip"]
    assert prepare.main(arguments) == 0
    output = capsys.readouterr().out
    assert f"{samples}:23: gone-19.png: " in output and "... and 5 more" in output
    assert len((out / "refused.txt").read_text().splitlines()) == 25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "--workers"),
        (["--recipe", "keye_tine"], "did you mean keye_tiny"),
        (["--set", "data.frames.frames_per_secon=1"], "did you mean frames_per_second"),
        (["--set", "data.tokenizer=nowhere"], "data.tokenizer: got 'nowhere'"),
    ],
)
def test_wrong_arguments_are_sentences(
    samples: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    out = str(samples.parent / "out")
    assert prepare.main([str(samples), "--out", out, *RECIPE, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_command_continues(samples: Path) -> None:
    text = line("<video>What?", videos=["v.mp4"])
    samples.write_text("\n".join(f"{text}\n{line(f'Why {n}?')}" for n in range(600)))
    out = samples.parent / "out"
    command = [sys.executable, "-m", "megatron_keye", "prepare", str(samples)]
    command += ["--out", str(out), "--recipe", "keye_tiny", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        whole = out.with_name("out.partial")
        until = time.monotonic() + 120
        while len(list(whole.glob("block-*"))) < 3:
            assert time.monotonic() < until and process.poll() is None, "no block was finished"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    ended = subprocess.run(
        [*command, "--workers", "1"], check=True, capture_output=True, text=True, timeout=120
    )
    assert "1,200" in ended.stdout
    assert not whole.exists()
    run = load_recipe("keye_tiny")(num_ranks=1, has_gpu=True)
    settings = ["data.row_tokens=4096", "data.shuffles=false"]
    rows = [
        RowLoader(
            run.with_overrides([f"data.samples={path}", *settings]).data, run.model, 0
        ).next_rows(20)
        for path in (samples, out)
    ]
    for one, other in zip(*rows, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        assert one.sample_names == other.sample_names
