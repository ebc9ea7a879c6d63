# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked and what it answers: tokens in, tokens out; text never crosses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config.rollout import RolloutConfig
from megatron_keye.data.row import Sample
from megatron_keye.data.tokens import END_OF_TEXT, TURN_END, Tokenizer

Finish = Literal["stop", "length", "aborted"]
Experts = NDArray[np.uint8]
"""Where tokens went [tokens, layers, experts of a token], NO_EXPERT for those that did not run."""


@dataclass(frozen=True, eq=False)
class AnswerRoutes:
    """Where the tokens of an answer and of its prompt went."""

    prompt: Experts
    """Of the prompt's tokens; one array for all answers to it."""
    answer: Experts
    """Of the answer's tokens, whose last one does not run."""


@dataclass(frozen=True, kw_only=True)
class SamplingLaw:
    """The law from which each token is drawn: softmax(logits / temperature), cut and rescaled."""

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the likeliest token, of equal ones that of the smallest id.
    Log-probabilities are then those of temperature 1 without a cut."""
    top_p: float = 1.0
    """Keeps the likeliest tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Keeps this many of the likeliest tokens, before top_p; 0 keeps all."""

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def is_cut(self) -> bool:
        """Whether some tokens may have no probability."""
        return not self.is_greedy and (self.top_p < 1 or self.top_k > 0)

    @classmethod
    def of(cls, rollout: RolloutConfig) -> "SamplingLaw":
        """Return the law that a run's settings describe."""
        return cls(temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k)


@dataclass(frozen=True, kw_only=True)
class BegunAnswer:
    """What an earlier process drew of an answer, which goes on or is finished."""

    token_ids: tuple[int, ...]
    """Its tokens so far."""
    log_probs: tuple[float, ...]
    """Log-probability of each."""
    version: int
    """Of the weights that drew them."""
    finish: Finish | None = None
    """Why it ended; None while it goes on."""
    routes: AnswerRoutes | None = None
    """Where its tokens went, if that was noted and it ended in this process."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how to answer it."""

    key: int
    """Number of the request, 0 or more; answers are known by it, and it decides their draws."""
    prompt: Sample
    """Tokens and pictures, without labels (`data.sample.make_prompt`)."""
    num_answers: int = 1
    """Answers wanted, which share the prompt's place in the cache."""
    max_new_tokens: int
    """Tokens after which an answer ends, 1 or more."""
    stop_ids: tuple[int, ...]
    """Tokens after which an answer ends; they belong to it."""
    law: SamplingLaw = field(default_factory=SamplingLaw)
    """How tokens are drawn."""
    seed: int
    """Seed of the draws; each depends on seed, key, answer and the token's number alone."""
    begun: Mapping[int, BegunAnswer] = field(default_factory=dict)
    """Answers that have begun, by number: they go on, and those that are finished are not
    returned again. At least one goes on, or is new."""

    def __post_init__(self) -> None:
        for name in ("num_answers", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"request.{name}: got {getattr(self, name)}, expected 1 or more")
        if self.key < 0 or len(self.prompt.token_ids) == 0:
            raise ValueError(
                f"request: got key {self.key} and {len(self.prompt.token_ids)} tokens, expected a "
                "key of 0 or more and a prompt"
            )
        num_finished = sum(answer.finish is not None for answer in self.begun.values())
        if num_finished >= self.num_answers or not set(self.begun) <= set(range(self.num_answers)):
            raise ValueError(
                f"request.begun: got answers {sorted(self.begun)}, {num_finished} of them "
                f"finished, expected some of {self.num_answers}, of which one goes on"
            )


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """A token as soon as it is drawn."""

    key: int
    """Its request."""
    answer: int
    """Number of the answer that it belongs to, from 0."""
    token_id: int
    """The token."""
    log_prob: float
    """Log-probability of the law that it was drawn from."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished answer."""

    key: int
    """Its request."""
    answer: int
    """Number among the request's answers, from 0."""
    token_ids: tuple[int, ...]
    """Its tokens; after "stop" the last is one of the request's `stop_ids`."""
    log_probs: tuple[float, ...]
    """Log-probability of each token under the law that it was drawn from."""
    finish: Finish
    """"stop", "length" for max_new_tokens, or "aborted": the model drew a placeholder of pictures,
    which no answer may hold and which is left out."""
    versions: tuple[tuple[int, int], ...]
    """Runs of tokens by the weights that drew them: version and number of tokens."""
    routes: AnswerRoutes | None = None
    """Where its tokens went, if the engine notes that."""

    @property
    def text_ids(self) -> tuple[int, ...]:
        """Its tokens without the one that ended it."""
        return self.token_ids[:-1] if self.finish == "stop" else self.token_ids


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end an answer of a chat."""
    return tuple(tokenizer.control_id(name) for name in (TURN_END, END_OF_TEXT))
