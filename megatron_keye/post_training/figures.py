# SPDX-License-Identifier: Apache-2.0
"""The figures of a step that learns from answers, and the updates of a step as one."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.post_training.learning import Learned
from megatron_keye.post_training.rollouts import Rollout
from megatron_keye.training.metrics import StepMetrics

_MOST_NOT_FINITE = 0.01
"""Share of ratios that are not finite above which the run ends."""
_SUMMED = (
    *("tokens", "step_seconds", "data_wait_seconds", "save_seconds", "validation_seconds"),
    *("decoder_seconds", "vision_seconds", "vision_wait_seconds", "pictures"),
)
_RATES = ("tflops_per_device", "mfu")
_MEANS = (
    *("loss", "indexer_kl", "indexer_recall", "router_load", "padding_share"),
    *("decode_queue", "decoded_per_second"),
)
_LARGEST = ("gradient_norm", "saved_seconds", "peak_memory_gib", "asks_to_stop", "has_failed_save")


def policy_figures(
    rollout: Rollout, learned: Learned, seconds: Mapping[str, float], run: RunConfig
) -> dict[str, float]:
    """Return the figures of a step by name; NaN where there is nothing to measure.

    Args:
        rollout: All answers of the step.
        learned: What was learned from those that count.
        seconds: Seconds of each part of the step.
        run: Its settings.
    """
    groups = rollout.groups
    completions = [each for group in groups for each in group.completions]
    rewards = [reward for group in groups for reward in group.rewards]
    scored = [reward for reward in rewards if reward is not None]
    ratios = list(learned.ratios.values())
    finishes = [each.finish for each in completions]
    by_task: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        by_task[group.task] += [each.task for each in group.rewards if each is not None]
    drops_equal = run.post_training.drops_equal_groups
    num_kept = len(rollout.kept(drops_equal=drops_equal))
    log_probs = [value for each in completions for value in each.log_probs]
    return {
        "reward": _mean([each.total for each in scored]),
        "reward_task": _mean([each.task for each in scored]),
        "reward_format": _mean([each.format for each in scored]),
        **{f"reward_task_{task}": _mean(values) for task, values in sorted(by_task.items())},
        "share_understood": _mean([each.is_understood for each in scored]),
        "share_not_scored": 1 - len(scored) / max(1, len(rewards)),
        "num_judged": float(sum(each.judge == "asked" for each in scored)),
        "num_judged_before": float(sum(each.judge == "kept" for each in scored)),
        "share_truncated": _mean([finish == "length" for finish in finishes]),
        "share_aborted": _mean([finish == "aborted" for finish in finishes]),
        "share_gated": learned.num_gated / max(1, learned.num_gated + len(ratios)),
        "share_clipped": _mean([each.clipped for each in ratios]),
        "share_not_finite": _mean([each.not_finite for each in ratios]),
        "ratio_mean": _mean([each.mean for each in ratios]),
        "ratio_min": min((each.mean for each in ratios), default=math.nan),
        "ratio_max": max((each.mean for each in ratios), default=math.nan),
        "rollout_log_prob_error": _mean(learned.log_prob_errors),
        "rollout_log_prob_error_max": float(np.max(learned.log_prob_errors, initial=0.0)),
        # Of the law that drew the tokens, which is what a mean over them estimates.
        "entropy": -_mean(log_probs),
        "answer_tokens": _mean([len(each.token_ids) for each in completions]),
        "num_prompts": float(rollout.num_prompts),
        "num_groups_dropped": float(len(groups) - num_kept),
        "num_answers_learned": float(len(ratios)),
        "num_updates": float(len(learned.metrics)),
        "age_steps": 0.0,
        # An answer that ended before its run was stopped does not say where its tokens went.
        "share_replayed": _mean([each.routes is not None for each in completions]),
        **{f"{part}_seconds": value for part, value in seconds.items()},
    }


def check_figures(figures: Mapping[str, float], rollout: Rollout, run: RunConfig) -> None:
    """Raise a UserError where too many answers were not scored, or have no finite ratio."""
    limit, share = run.post_training.max_failed_rewards, figures["share_not_scored"]
    if share > limit:
        why = f"; the last: {rollout.failures[-1]}" if rollout.failures else ""
        raise UserError(
            f"post_training.max_failed_rewards: {share:.1%} of the answers of a step were not "
            f"scored, expected at most {limit:.1%}{why}"
        )
    if figures["share_not_finite"] > _MOST_NOT_FINITE:
        raise UserError(
            f"post_training: {figures['share_not_finite']:.1%} of the ratios of a step are not "
            f"finite, expected at most {_MOST_NOT_FINITE:.0%}; weights or log-probabilities are "
            "sick: continue from an earlier checkpoint with a lower "
            "training.optimizer.learning_rate"
        )


def describe_figures(figures: Mapping[str, float]) -> str:
    """Return the figures by which one sees whether a run learns, in a line."""
    return (
        f"reward {figures['reward']:.3f}  task {figures['reward_task']:.3f}  "
        f"clipped {figures['share_clipped']:.0%}  truncated {figures['share_truncated']:.0%}  "
        f"entropy {figures['entropy']:.2f}  tokens {figures['answer_tokens']:.0f}  "
        f"groups dropped {figures['num_groups_dropped']:.0f}  "
        f"answering {figures['generate_seconds']:.3g} s"
    )


def as_one_step(metrics: Sequence[StepMetrics]) -> StepMetrics:
    """Return the metrics of a step of several updates: sums, the largest, or means over them.

    Args:
        metrics: Of each update, one or more.
    """
    last = metrics[-1]
    values = {name: [getattr(each, name) for each in metrics] for name in vars(last)}
    tokens, seconds = sum(values["tokens"]), sum(values["step_seconds"])
    weights = np.array(values["step_seconds"]) / seconds
    combined: dict[str, Any] = {name: sum(values[name]) for name in _SUMMED}
    combined |= {name: max(values[name]) for name in _LARGEST}
    combined |= {name: float(np.mean(values[name])) for name in _MEANS}
    combined |= {name: float(weights @ np.array(values[name])) for name in _RATES}
    combined["was_applied"] = any(values["was_applied"])
    combined["tokens_per_second"] = tokens / seconds
    return replace(last, **combined)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
