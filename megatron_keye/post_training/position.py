# SPDX-License-Identifier: Apache-2.0
"""Where a run that learns from its answers stands in its questions, in its checkpoints."""

from dataclasses import dataclass, field
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.post_training.prompts import Prompts
from megatron_keye.post_training.rollouts import Begun
from megatron_keye.rollout.request import BegunAnswer


@dataclass(kw_only=True)
class Position:
    """The next prompt, and the answers of a step that was stopped before its updates."""

    next_prompt: int = 0
    """Number of the prompt that comes next; it decides the draws of its answers."""
    num_idle: int = 0
    """Steps in a row without an update, since no rewards differed."""
    begun: Begun = field(default_factory=dict)
    """Answers that the next step begins with, as token ids."""

    def state_dict(self, prompts: Prompts) -> dict[str, Any]:
        """Return it ready for JSON, in the form of a run's position of the data."""
        return {
            "next_prompt": self.next_prompt,
            "num_idle": self.num_idle,
            "num_skipped": 0,
            "questions_digest": prompts.digest,
            "begun": [
                [*key, answer.token_ids, answer.log_probs, answer.version, answer.finish]
                for key, answer in sorted(self.begun.items())
            ],
        }

    @classmethod
    def of(cls, state: dict[str, Any], prompts: Prompts, run: RunConfig) -> "Position":
        """Return what `state_dict` returned.

        Raises:
            UserError: When the questions are others than those of the saved run.
        """
        if state.get("questions_digest") != prompts.digest:
            raise UserError(
                f"data.samples: got {run.data.samples}, whose questions differ from those that "
                "the checkpoint was saved with, expected the same; set them back, or begin a run "
                "of another name from its weights with training.checkpoint.weights"
            )
        begun = {
            (key, number): BegunAnswer(
                token_ids=tuple(token_ids),
                log_probs=tuple(log_probs),
                version=version,
                finish=finish,
            )
            for key, number, token_ids, log_probs, version, finish in state["begun"]
        }
        return cls(next_prompt=state["next_prompt"], num_idle=state["num_idle"], begun=begun)
