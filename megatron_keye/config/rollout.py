# SPDX-License-Identifier: Apache-2.0
"""Settings of generation: the grid, the cache of keys and values, and the law of tokens."""

from dataclasses import dataclass
from typing import Literal

from megatron_keye.config.check import check, check_numbers


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How a model answers: its grid while it generates, its cache, and how tokens are drawn."""

    tensor: int = 0
    """Tensor-parallel ranks while generating; 0: as parallel.decoder.tensor. There are no pipeline
    stages and no context ranks then: such ranks become replicas. Where these degrees are not those
    of training, a run that trains gives its weights to the ranks that generate, which then hold
    what they do not train a second time, while answers are wanted."""
    expert: int = 0
    """Expert-parallel ranks while generating; 0: as parallel.decoder.expert."""
    page_tokens: int = 64
    """Tokens of a page, in which the cache is given to sequences."""
    cache_tokens: int = 0
    """Tokens whose keys and values a replica's cache holds; 0: what fits into cache_share of a
    GPU's free memory, on a CPU 65,536."""
    cache_share: float = 0.8
    """Share of the memory that is free when answers are wanted, which the cache takes on a GPU; a
    run that learns from its answers has it back while it learns."""
    cache_quantization: Literal["none", "fp8"] = "none"
    """"fp8" keeps keys and values as e4m3 with a scale for each head of a token, in a little more
    than half the memory; prompts and answers alike then attend to rounded keys, and
    log-probabilities are no longer those of training (docs/answers.md says by how much). "none"
    keeps them in the type of the model."""
    prefill_tokens: int = 16_384
    """Most tokens of prompts that a replica runs between two tokens of the answers; a longer
    prompt goes in parts, and no image or frame is cut."""
    max_sequences: int = 64
    """Answers that a replica generates at once; more wait."""
    uses_cuda_graphs: bool = False
    """Whether a GPU launches a token of all answers as one CUDA graph for each number of answers
    and of pages, rounded up to powers of two, captured anew for new weights. Needs sparse
    attention, one tensor and one expert rank, training.precision=bf16,
    training.expert_layers=torch and training.fusions.permutation. A CPU fills the same tensors and
    has no graph."""
    max_new_tokens: int = 1_024
    """Tokens after which an answer ends."""
    server: str = ""
    """URL of an SGLang server that answers in place of this process, with the weights that it was
    started with; "": none. It draws by itself and takes prompts of text alone."""
    server_timeout_seconds: float = 600.0
    """Most seconds for one answer of the server."""
    skips_thinking: bool = False
    """Whether prompts end with an empty block of thinking, so that the model answers at once; for
    models trained with data.thinking="qwen3"."""
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draws among the likeliest tokens whose probabilities reach this sum; 1: among all."""
    top_k: int = 0
    """Draws among this many of the likeliest tokens, and those as likely as the last of them; 0:
    among all."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "rollout",
            above_zero="page_tokens cache_share prefill_tokens max_sequences max_new_tokens top_p "
            "server_timeout_seconds",
            zero_or_more="tensor expert cache_tokens temperature top_k",
        )
        check(self.cache_share <= 1, "rollout.cache_share", self.cache_share, "at most 1")
        check(self.top_p <= 1, "rollout.top_p", self.top_p, "at most 1")
        check(
            self.cache_quantization in ("none", "fp8"),
            "rollout.cache_quantization",
            self.cache_quantization,
            "'none' or 'fp8'",
        )
        check(
            self.cache_quantization == "none" or not self.server,
            "rollout.cache_quantization",
            self.cache_quantization,
            "'none' with rollout.server, which has a cache of its own",
        )
