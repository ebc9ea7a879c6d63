# SPDX-License-Identifier: Apache-2.0
"""The contact sheet shows exactly the chosen frames, and the text with runs shortened."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data.conversation import parse_conversation
from megatron_keye.data.remote.copies import NO_REMOTE
from megatron_keye.data.sample import make_sample
from megatron_keye.data.store.make import make_store
from megatron_keye.data.store.preview import _thumbnails, marked_text, write_preview
from megatron_keye.data.store.reader import SampleStore
from megatron_keye.data.store.settings import deciding_settings
from megatron_keye.data.tokens import load_tokenizer
from tests.support.clips import HEIGHT, WIDTH, make_clip, read_number, tiny_model

MODEL = tiny_model()
CONFIG = DataConfig(
    samples="none",
    row_tokens=4096,
    frames=FrameConfig(min_tokens_per_frame=8, max_tokens_per_frame=10),
)


def test_frames_and_text_are_those_of_the_sample(tmp_path: Path) -> None:
    make_clip(tmp_path / "v.mp4", 60)
    Image.new("RGB", (28, 28), "red").save(tmp_path / "i.png")
    content = "<image>A<video>B"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    record = {"messages": turns, "images": ["i.png"], "videos": ["v.mp4"]}
    conversation = parse_conversation(json.dumps(record), "s:1", tmp_path)
    tokenizer = load_tokenizer("qwen")
    sample = make_sample(conversation, tokenizer, CONFIG, MODEL)
    shown = _thumbnails(list(sample.pictures), MODEL.vision.patch_size, NO_REMOTE)
    assert len(shown) == len(sample.pictures) == 6
    assert np.asarray(shown[0])[0, 0].tolist() == [255, 0, 0]
    for place, picture in enumerate(sample.pictures[1:], start=1):
        pixels = np.asarray(shown[place].resize((WIDTH, HEIGHT)))
        assert read_number(pixels) == picture.frame
    text = marked_text(sample, tokenizer, MODEL)
    size = sample.pictures[1].num_tokens(2)
    frames = "".join(
        f"<{p.seconds:.1f} seconds><|vision_start|><|video_pad|>x{size}<|vision_end|>"
        for p in sample.pictures[1:]
    )
    image = f"<|vision_start|><|image_pad|>x{sample.pictures[0].num_tokens(2)}<|vision_end|>"
    assert text == (
        f"<|im_start|>user\n{image}A{frames}B<|im_end|>\n"
        "<|im_start|>assistant\n\u27e6Yes.<|im_end|>\u27e7\n"
    )


def test_the_mask_of_an_agents_file_is_shown(tmp_path: Path) -> None:
    call = {"name": "look", "arguments": {"start": 1, "end": 2}}
    messages = [
        {"role": "user", "content": "<image>When?"},
        {"role": "assistant", "content": "First", "loss": 0.5},
        {"role": "tool_call", "content": json.dumps(call)},
        {"role": "tool_response", "content": "<frames>"},
        {"role": "assistant", "content": "At 1.5 s", "reasoning_content": "So"},
    ]
    tools = json.dumps([{"name": "look", "description": "d", "parameters": {}}])
    record = {"messages": messages, "tools": tools, "images": ["i.png"], "source": "made"}
    Image.new("RGB", (28, 28), "red").save(tmp_path / "i.png")
    (tmp_path / "s.json").write_text(json.dumps([record], indent=1))
    store, config = tmp_path / "s.zarr", replace(CONFIG, loss_weighting="sample")
    totals = make_store(tmp_path / "s.json", store, config, MODEL, num_workers=1, skips_bad=False)
    assert totals["unread"] == {"source": 1}
    write_preview(store, config, MODEL, 1)
    text = (tmp_path / "s.zarr.preview.txt").read_text(encoding="utf-8")
    assert "keys that were not read: source (1)" in text
    (sample,) = SampleStore(store, deciding_settings(load_tokenizer("qwen"), config, MODEL)).load(
        [0]
    )
    num_labels = int((sample.labels >= 0).sum())
    first, last = 0.5 / num_labels, 1 / num_labels
    called = '<tool_call>\n{"name": "look", "arguments": {"start": 1, "end": 2}}\n</tool_call>'
    assert (
        f"assistant\n\u27e6{first:.3g}: First\u27e7"
        f"\u27e6{last:.3g}: \n{called}<|im_end|>\u27e7\n"
        "<|im_start|>user\n<tool_response>\n<frames>\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n\u27e6{last:.3g}: <think>\nSo\n</think>\n\n"
        "At 1.5 s<|im_end|>\u27e7\n"
    ) in text
    assert Image.open(tmp_path / "s.zarr.preview.png").width == 1600
    blue = np.asarray(Image.open(tmp_path / "s.zarr.preview.png")).reshape(-1, 3)
    assert (blue == (0, 0, 255)).all(1).any(), "nothing is drawn as predicted"
