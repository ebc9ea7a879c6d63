"""The contact sheet shows exactly the chosen frames, and the text with runs shortened."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data.conversation import parse_conversation
from megatron_keye.data.sample import make_sample
from megatron_keye.data.store.preview import _thumbnails, abbreviated_text
from megatron_keye.data.tokens import load_tokenizer
from tests.support.clips import HEIGHT, WIDTH, make_clip, read_number, tiny_model

MODEL = tiny_model()
CONFIG = DataConfig(
    samples="",
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
    shown = _thumbnails(list(sample.pictures), MODEL.vision.patch_size)
    assert len(shown) == len(sample.pictures) == 6
    assert np.asarray(shown[0])[0, 0].tolist() == [255, 0, 0]
    for place, picture in enumerate(sample.pictures[1:], start=1):
        pixels = np.asarray(shown[place].resize((WIDTH, HEIGHT)))
        assert read_number(pixels) == picture.frame
    text = abbreviated_text(sample, tokenizer, MODEL)
    size = sample.pictures[1].num_tokens(2)
    frames = "".join(
        f"<{p.seconds:.1f} seconds><|vision_start|><|video_pad|>x{size}<|vision_end|>"
        for p in sample.pictures[1:]
    )
    image = f"<|vision_start|><|image_pad|>x{sample.pictures[0].num_tokens(2)}<|vision_end|>"
    assert text == (
        f"<|im_start|>user\n{image}A{frames}B<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
