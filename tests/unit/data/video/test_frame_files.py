# SPDX-License-Identifier: Apache-2.0
"""Videos of frame files: shown in order at their true times, decoded, stored and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data.conversation import parse_conversation
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_sample
from megatron_keye.data.store.make import make_store
from megatron_keye.data.store.reader import SampleStore
from megatron_keye.data.store.settings import deciding_settings
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.data.video.chunk_patches import decode_chunks
from megatron_keye.data.video.frame_decoder import make_decoder
from tests.support.clips import tiny_model

MODEL = tiny_model()
FRAMES = FrameConfig(min_tokens_per_frame=1, max_tokens_per_frame=4)
CONFIG = DataConfig(samples="none", row_tokens=512, frames=FRAMES)
ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of twelve frames, each of another grey, numbered without leading zeros."""
    (tmp_path / "v").mkdir()
    for number in range(12):
        Image.new("L", (28, 28), 20 * number).save(tmp_path / "v" / f"f{number}.png")
    (tmp_path / "v" / ".hidden").touch()
    return tmp_path


def record(video: Any, **more: Any) -> dict[str, Any]:
    content = [{"type": "video", "video": video, **more}]
    return {"messages": [{"role": "user", "content": content}, ANSWER]}


def sample_of(base: Path, video: Any, **more: Any) -> Sample:
    conversation = parse_conversation(json.dumps(record(video, **more)), "s:1", base)
    return make_sample(conversation, load_tokenizer("qwen"), CONFIG, MODEL)


def frames_of(sample: Sample) -> list[tuple[str, float | None]]:
    return [(Path(p.medium.path).name, p.seconds) for p in sample.pictures]


def test_frames_of_a_folder_are_shown_in_order_at_their_times(folder: Path) -> None:
    sample = sample_of(folder, "v", sample_fps=4)
    assert frames_of(sample) == [(f"f{n}.png", n / 4) for n in range(12)]
    text = load_tokenizer("qwen").decode(sample.token_ids.tolist())
    assert "<2.8 seconds><|vision_start|><|video_pad|>" in text
    assert all(picture.is_video for picture in sample.pictures)
    patches = next(
        decode_chunks(
            [sample.pictures], make_decoder("pyav", torch.device("cpu"), 1), MODEL.vision
        )
    )
    size = sample.pictures[0].num_patches
    levels = [float(patches[n * size : (n + 1) * size].mean()) for n in range(12)]
    assert levels == sorted(levels) and levels[-1] - levels[0] > 1, "not those frames"


def test_a_list_of_frames_obeys_window_rate_and_number(folder: Path) -> None:
    names = [f"v/f{n}.png" for n in (3, 1, 2)]
    assert frames_of(sample_of(folder, names, fps=2)) == [
        *(("f3.png", 0.0), ("f1.png", 0.5), ("f2.png", 1.0)),
    ]
    assert len(sample_of(folder, "v", sample_fps=4, fps=1).pictures) == 3
    assert len(sample_of(folder, "v", sample_fps=4, nframes=5).pictures) == 5
    window = sample_of(folder, "v", sample_fps=4, start=1, end=2)
    assert [seconds for _, seconds in frames_of(window)] == [1.0, 1.25, 1.5, 1.75]


def test_a_store_keeps_frame_files(folder: Path) -> None:
    lines = [record("v", sample_fps=4), record(["v/f1.png", "v/f2.png"], sample_fps=1)]
    (folder / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = folder / "s.zarr"
    totals = make_store(folder / "s.jsonl", out, CONFIG, MODEL, num_workers=1, skips_bad=False)
    assert totals["num_media"] == 12 and totals["num_pictures"] == 14
    settings = deciding_settings(load_tokenizer("qwen"), CONFIG, MODEL)
    stored = SampleStore(out, settings).load([0, 1])
    for sample, line in zip(stored, lines, strict=True):
        made = make_sample(
            parse_conversation(json.dumps(line), "s", folder),
            load_tokenizer("qwen"),
            CONFIG,
            MODEL,
        )
        assert sample.pictures == made.pictures
        assert (sample.token_ids == made.token_ids).all()
    Image.new("L", (28, 28), 7).save(folder / "v" / "f1.png")
    with pytest.raises(ValueError, match=r"s\.jsonl:2: .*f1\.png: has changed since"):
        SampleStore(out, settings).measure(1)


def test_frames_without_a_known_time_or_of_other_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="s:1: v: is a video of 12 frame files without a rate"):
        sample_of(folder, "v")
    Image.new("L", (56, 28)).save(folder / "v" / "f5.png")
    with pytest.raises(ValueError, match=r"f5\.png: is 28 x 56 pixels, expected 28 x 28"):
        sample_of(folder, "v", sample_fps=2)
    (folder / "v" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"v: is a folder with notes\.txt, expected frames alone"):
        sample_of(folder, "v", sample_fps=2)
    with pytest.raises(ValueError, match=r"s:1: gone\.png: .* is not there"):
        sample_of(folder, ["gone.png"], sample_fps=2)
    (folder / "v.mp4").touch()
    with pytest.raises(ValueError, match="a video file with 'sample_fps'"):
        sample_of(folder, "v.mp4", sample_fps=2)
