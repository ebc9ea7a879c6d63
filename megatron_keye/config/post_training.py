# SPDX-License-Identifier: Apache-2.0
"""Settings of training on a model's own answers: groups of answers, the objective, the loop."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_keye.config.check import check, check_numbers
from megatron_keye.config.judge import JudgeConfig

Kind = Literal["none", "gspo", "grpo"]
"""What a run learns from: samples, or scored answers of its own."""


@dataclass(frozen=True, kw_only=True)
class PostTrainingConfig:
    """How a run learns from its own answers, of which rewards tell the better ones.

    A step generates answers, scores them, and updates the weights once for each mini-batch. How
    many rows a step has follows from its answers; data.samples is a file of questions with their
    truth, as `megatron-keye evaluate` takes it.
    """

    kind: Kind = "none"
    """"none": the run learns from samples. "gspo": from its own answers, with one ratio of
    probabilities for each answer. "grpo": with one for each token."""
    prompts_per_step: int = 32
    """Prompts whose answers a step learns from."""
    answers_per_prompt: int = 8
    """Answers to each prompt, which are compared with each other; 2 or more."""
    minibatches: int = 4
    """Updates of a step, each with its share of the prompts."""
    clip_low: float = 3e-4
    """How far below 1 the ratio of an answer that is worse than its group's mean still counts;
    a token's, with kind "grpo", for which 0.2 is usual."""
    clip_high: float = 4e-4
    """How far above 1 the ratio of an answer that is better than its group's mean still counts."""
    old_log_probs: Literal["trainer", "engine"] = "trainer"
    """Whose log-probabilities the ratios are relative to: those of a forward pass of training
    before the step's first update, or those of generation, which saves that pass."""
    gate_low: float = 0.999
    """With old_log_probs "trainer": an answer whose geometric mean of training's probabilities
    over generation's is below this does not count."""
    gate_high: float = 1.002
    """The same for a mean above this."""
    max_log_prob_error: float = 0.05
    """Mean difference between log-probabilities of generation and of training, in nats, above
    which the run ends."""
    replays_routes: bool = False
    """Whether training routes each token of prompts and answers to the experts to which generation
    routed it, in every pass of a step. Generation then keeps a byte for each expert, layer and
    token, which all ranks hold in main memory: 384 bytes a token of the released model. It is not
    saved: an answer that had ended when a run was stopped is not replayed (`share_replayed`)."""
    drops_equal_groups: bool = True
    """Whether a prompt whose answers all have the same reward is replaced by another one."""
    oversampling: float = 2.0
    """Most prompts of a step, as a multiple of prompts_per_step; then it goes on with fewer."""
    truncated: Literal["masked", "scored"] = "masked"
    """Whether answers that end at rollout.max_new_tokens are left out of the loss, or count as
    others do. Their reward is in the mean of their group either way."""
    task_weight: float = 0.9
    """Weight of what an answer is worth by its task."""
    format_weight: float = 0.1
    """Weight of its form: that it ended by itself, with its thinking, if any, in one block before
    the answer."""
    requires_thinking: bool = False
    """Whether an answer without such a block scores 0."""
    reward_processes: int = 2
    """Processes of rank 0 that score answers beside generation."""
    reward_seconds: float = 10.0
    """Seconds after which an answer counts as not scored, which leaves it out."""
    max_failed_rewards: float = 0.05
    """Share of a step's answers that were not scored above which the run ends."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """A language model in place of the rules for free text."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "post_training",
            above_zero="prompts_per_step answers_per_prompt minibatches clip_low clip_high "
            "gate_low gate_high max_log_prob_error oversampling task_weight reward_processes "
            "reward_seconds",
            zero_or_more="format_weight max_failed_rewards",
        )
        choices = {
            "kind": ("none", "gspo", "grpo"),
            "old_log_probs": ("trainer", "engine"),
            "truncated": ("masked", "scored"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            check(value in known, f"post_training.{name}", value, f"one of {known}")
        answers, prompts = self.answers_per_prompt, self.prompts_per_step
        check(answers >= 2, "post_training.answers_per_prompt", answers, "2 or more")
        check(
            prompts >= self.minibatches,
            "post_training.prompts_per_step",
            prompts,
            f"at least post_training.minibatches = {self.minibatches}",
        )
        for name, value, holds, expected in (
            ("oversampling", self.oversampling, self.oversampling >= 1, "1 or more"),
            ("clip_low", self.clip_low, self.clip_low < 1, "less than 1"),
            ("gate_low", self.gate_low, self.gate_low < 1, "less than 1"),
            ("gate_high", self.gate_high, self.gate_high > 1, "more than 1"),
            (
                "reward_seconds",
                self.reward_seconds,
                not self.judge.url or self.reward_seconds > self.judge.timeout_seconds,
                f"more than post_training.judge.timeout_seconds = {self.judge.timeout_seconds:g}",
            ),
        ):
            check(holds, f"post_training.{name}", value, expected)

    @property
    def is_on(self) -> bool:
        """Whether the run learns from its own answers."""
        return self.kind != "none"

    @property
    def most_prompts(self) -> int:
        """Prompts that a step asks at most."""
        return max(self.prompts_per_step, int(self.oversampling * self.prompts_per_step))
