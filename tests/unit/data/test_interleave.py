# SPDX-License-Identifier: Apache-2.0
"""Captioned videos become pieces with captions between, which training reads as samples."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.cli import interleave as command
from megatron_keye.config import DataConfig, FrameConfig, ModelConfig
from megatron_keye.data.interleave import Caption, cut, group_captions
from megatron_keye.data.row import IGNORED_LABEL
from megatron_keye.data.source import ConversationFile
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.recipes import load_recipe
from tests.support.clips import BIG_BUCK_BUNNY

CAPTIONS = [
    {"start": 3.0, "end": 5.0, "caption": "It yawns."},
    {"start": 0.0, "end": 2.5, "caption": "A rabbit crawls out of its burrow."},
]


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(folder: Path, *records: object) -> Path:
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_samples_show_each_stretch_once_and_predict_the_captions_alone(tmp_path: Path) -> None:
    source = written(tmp_path, {"video": BIG_BUCK_BUNNY, "captions": CAPTIONS})
    out = tmp_path / "samples.jsonl"
    assert command.main([str(source), "--out", str(out), "--piece-seconds", "1.5"]) == 0
    model: ModelConfig = load_recipe("keye_tiny")(num_ranks=1, has_gpu=False).model
    config = DataConfig(samples=str(out), row_tokens=999, frames=FrameConfig(max_seconds=1.5))
    tokenizer = load_tokenizer("qwen")
    [sample] = ConversationFile(out, tokenizer, config, model).load([0])
    times = [picture.seconds for picture in sample.pictures]
    assert times == sorted(set(times)) and max(times) < 5.0
    assert not [seconds for seconds in times if 2.5 <= seconds < 3.0], "nobody described it"
    predicted = [int(label) for label in sample.labels if label != IGNORED_LABEL]
    wanted = [tokenizer.encode(text) for text in (CAPTIONS[1]["caption"], CAPTIONS[0]["caption"])]
    end = tokenizer.control_id("<|im_end|>")
    assert predicted == [*wanted[0], end, *wanted[1], end]


def test_a_long_video_becomes_several_samples_and_names_start_from_the_new_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = [{"start": n * 20, "end": n * 20 + 20, "caption": f"{n}"} for n in range(5)]
    records = [{"video": name, "captions": captions} for name in ("a/b.mp4", "/c.mp4", "s3://d")]
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "samples.jsonl"
    assert command.main([str(written(tmp_path, *records)), "--out", str(out)]) == 0
    samples = lines_of(out)
    assert [len(sample["messages"]) for sample in samples] == [6, 4] * 3
    first = samples[0]["messages"][0]["content"]
    assert [(part["start"], part["end"]) for part in first] == [(0, 10), (10, 20)]
    names = [sample["messages"][0]["content"][0]["video"] for sample in samples[::2]]
    assert names == [os.path.join("..", "a", "b.mp4"), "/c.mp4", "s3://d"]
    assert "6 samples of 3 videos, 15 captions after 30 pieces, at most 60.0 s" in (
        capsys.readouterr().out
    )
    assert command.main([str(written(tmp_path, *records)), "--out", str(out)]) == 2
    assert "which exists" in capsys.readouterr().err


@given(st.floats(0, 1e4), st.floats(0.01, 1e4), st.floats(0.5, 100))
def test_pieces_cover_the_stretch_and_none_is_longer(
    start: float, seconds: float, most: float
) -> None:
    pieces = cut(Caption(start=start, end=start + seconds, text="x"), most)
    assert pieces[0][0] == start and pieces[-1][1] == start + seconds
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    assert all(0 < end - begin <= most + 2e-6 for begin, end in pieces)
    assert len(pieces) == 1 or (len(pieces) - 1) * most < seconds


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=20), st.floats(1, 100))
def test_a_sample_holds_as_many_captions_as_fit(lengths: list[float], most: float) -> None:
    captions = [Caption(start=0, end=length, text="x") for length in lengths]
    groups = group_captions(captions, most)
    assert [caption for group in groups for caption in group] == captions
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        seconds = sum(caption.seconds for caption in group)
        assert seconds <= most + 1e-5 or len(group) == 1
        assert not following or seconds + following[0].seconds > most


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"video": "a.mp4"}, "got ['video'], expected an object with ['captions', 'video']"),
        ([1], "got list, expected an object"),
        ({"video": "", "captions": CAPTIONS}, "'video': got ''"),
        ({"video": "a", "captions": []}, "'captions': got []"),
        ({"video": "a", "captions": [{"start": 0, "end": 1}]}, "expected ['caption', 'end', "),
        ({"video": "a", "captions": [{"start": 2, "end": 1, "caption": "x"}]}, "from 2 to 1,"),
        (
            {"video": "a", "captions": [{"start": float("nan"), "end": 1, "caption": "x"}]},
            "from nan to 1, expected seconds",
        ),
        ({"video": "a", "captions": [{"start": -1, "end": 1, "caption": "x"}]}, "from -1 to 1"),
        ({"video": "a", "captions": [{"start": 0, "end": 1, "caption": " "}]}, "caption ' ', exp"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number_and_leaves_nothing(
    record: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path, {"video": "a", "captions": CAPTIONS}, record)
    assert command.main([str(source), "--out", str(tmp_path / "samples.jsonl")]) == 2
    error = capsys.readouterr().err
    assert f"{source}:2: " in error and message in error
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("text", ["", "\n", "{", "[" * 100_000])
def test_a_file_without_videos_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "captions.jsonl"
    source.write_text(text)
    assert command.main([str(source), "--out", str(tmp_path / "samples.jsonl")]) == 2
    assert str(source) in capsys.readouterr().err
    assert command.main([str(tmp_path / "gone"), "--out", str(tmp_path / "s.jsonl")]) == 2


def test_seconds_are_above_zero(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "nan", "inf", "x"):
        with pytest.raises(SystemExit):
            command.main(["captions.jsonl", "--out", "x", "--piece-seconds", wrong])
    assert "expected seconds above 0" in capsys.readouterr().err
