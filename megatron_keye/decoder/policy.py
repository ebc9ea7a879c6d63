# SPDX-License-Identifier: Apache-2.0
"""Weights that turn the cross entropy of a model's own answers into a clipped policy gradient.

The objective of an answer of n tokens with advantage A is min(s A, clip(s) A), averaged over
answers (GSPO), or the mean of the same over its tokens (GRPO). Its gradient is that of a cross
entropy in which each token weighs u s A / n, a constant: u is 0 where the clipped part is the
smaller one, else 1.

    GSPO: s = exp(mean over the answer's tokens of log p - old log p)
    GRPO: s = exp(log p - old log p), for each token

Source: Zheng et al., Group Sequence Policy Optimization, arXiv 2507.18071, equations 5 to 10; Shao
et al., DeepSeekMath, arXiv 2402.03300, equation 3 without its KL term.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.decoder.batch import AnswerBatch

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are cut here, beyond which exp is of no use."""


@torch.no_grad()
def policy_weights(
    log_probs_L: Tensor,
    answers: AnswerBatch,
    weights_L: Tensor,
    *,
    settings: PostTrainingConfig,
    cp_group: dist.ProcessGroup,
) -> Tensor:
    """Return the weight of each label's cross entropy. Collective over the context ranks.

    Args:
        log_probs_L: [L] log-probabilities of this rank's labels now.
        answers: Log-probabilities before, answers and their advantages.
        weights_L: float32 [L]: 1 / n for each of an answer's n tokens.
        settings: One ratio an answer or a token, and where it is clipped.
        cp_group: Context-parallel group, which has the other labels of the same answers.

    Returns:
        [L], of the dtype of `log_probs_L`; 0 for answers, with GRPO tokens, whose log-ratio is not
        finite.
    """
    log_ratios_L = log_probs_L.double() - answers.old_log_probs_L
    if settings.kind == "gspo":
        log_ratios_A = torch.zeros_like(answers.advantages_A)
        log_ratios_A.index_add_(0, answers.answers_L, log_ratios_L * weights_L.double())
        dist.all_reduce(log_ratios_A, group=cp_group)
        factors_L = _factors(log_ratios_A, answers.advantages_A, settings)[answers.answers_L]
    else:
        advantages_L = answers.advantages_A[answers.answers_L]
        factors_L = _factors(log_ratios_L, advantages_L, settings)
    return (factors_L * weights_L.double()).to(log_probs_L.dtype)


def _factors(log_ratios: Tensor, advantages: Tensor, settings: PostTrainingConfig) -> Tensor:
    """Return u s A, which are 0 where the ratio is clipped or not finite.

    Args:
        log_ratios: float64, of any shape.
        advantages: float64, of the same shape.
        settings: Where ratios are clipped.
    """
    ratios = log_ratios.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    is_clipped = torch.where(
        advantages > 0, ratios > 1 + settings.clip_high, ratios < 1 - settings.clip_low
    )
    counts = log_ratios.isfinite() & ~is_clipped
    return torch.where(counts, ratios * advantages, 0.0)
