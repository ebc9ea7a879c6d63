# SPDX-License-Identifier: Apache-2.0
"""A prompt with its answers and their rewards."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.row import Sample
from megatron_keye.post_training.groups import advantages, has_variance
from megatron_keye.post_training.reward import Reward
from megatron_keye.rollout.request import Completion


@dataclass(frozen=True, kw_only=True)
class AnsweredGroup:
    """The answers to one prompt."""

    key: int
    """Number of the prompt among all that the run has asked; decides its draws."""
    name: str
    """File and question, for logs."""
    task: str
    """Kind of the question."""
    prompt: Sample
    """Tokens and pictures."""
    completions: list[Completion]
    """Answers in the order of their numbers."""
    texts: list[str] = field(default_factory=list)
    """Their texts."""
    rewards: list[Reward | None]
    """What each is worth; None for one that was not scored."""

    @cached_property
    def totals(self) -> NDArray[np.float64]:
        """Reward of each answer [G], NaN for one that was not scored."""
        return np.array([np.nan if r is None else r.total for r in self.rewards])

    @cached_property
    def advantages(self) -> NDArray[np.float64]:
        """Advantage of each answer [G], likewise."""
        return advantages(self.totals)

    @property
    def teaches(self) -> bool:
        """Whether its rewards differ."""
        return has_variance(self.totals)
