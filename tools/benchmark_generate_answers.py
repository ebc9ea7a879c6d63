# SPDX-License-Identifier: Apache-2.0
"""Many answers to one long prompt: the pages that they take, and their log-probabilities."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron_keye.rollout.cache import bytes_per_token
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.rollout.request import Completion, NewToken
from tools.benchmark_generate_setup import Bench


def compare_answers(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield a line of the pages, and one of the log-probabilities."""
    num_answers, new_tokens = bench.options.answers, bench.options.new_tokens
    tokens = bench.options.tokens + num_answers * (new_tokens + bench.run.rollout.page_tokens)
    rollout = replace(bench.run.rollout, cache_tokens=tokens + bench.run.rollout.page_tokens)
    engine = bench.engine(replace(bench.run, rollout=rollout))
    _, alone, _ = _answered(bench, engine, 1)
    answers, together, seconds = _answered(bench, engine, num_answers)
    page = bench.run.rollout.page_tokens
    num_drawn = sum(len(each.token_ids) for each in answers)
    yield {
        "op": "shared_prompt",
        "tokens": bench.options.tokens,
        "answers": num_answers,
        "new_tokens": new_tokens,
        "pages_of_one": alone,
        "pages_of_all": together,
        "mebibytes_of_all": round(together * page * bytes_per_token(bench.run) / 2**20, 1),
        "all_to_one": round(together / alone, 3),
        "tokens_per_s": round(num_drawn / seconds, 1),
    }
    del engine
    differences = torch.cat(
        [
            (torch.tensor(each.log_probs) - bench.training_forward(each.token_ids).cpu()).abs()
            for each in answers
            if each.token_ids
        ]
    )
    yield {
        "op": "log_probs",
        "tokens": bench.options.tokens,
        "drawn": len(differences),
        "mean_difference": float(differences.mean()),
        "largest_difference": float(differences.max()),
    }


def _answered(
    bench: Bench, engine: EmbeddedEngine, num_answers: int
) -> tuple[list[Completion], int, float]:
    """Return answers to the prompt, the most pages that were held, and seconds."""
    most = 0

    def note(token: NewToken) -> None:
        nonlocal most
        most = max(most, engine.num_used_pages)

    request = bench.request(num_answers=num_answers, max_new_tokens=bench.options.new_tokens)
    began = time.perf_counter()
    answers = list(engine.generate([request], note))
    return answers, most, time.perf_counter() - began
